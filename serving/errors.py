"""Refusals in the form of OpenAI's errors."""

from http import HTTPStatus

from starlette.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

RETRY_SECONDS = 1


class Refused(Exception):  # noqa: N818 - as starlette names its own
    """A request that is refused: the status, why in one word for the counter, and what to do about it."""

    def __init__(self, status: HTTPStatus, reason: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.param = status, reason, param

    def response(self) -> JSONResponse:
        """The answer; one that says when to try again where that helps."""
        return error_response(self.status, str(self), self.param)


def error_response(status: HTTPStatus, message: str, param: str | None = None) -> JSONResponse:
    """An OpenAI-style error."""
    kind = "".join(status.phrase.split()) + ("" if status.phrase.endswith("Error") else "Error")
    error = ErrorResponse(error=ErrorInfo(message=message, type=kind, param=param, code=status.value))
    headers = {}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.model_dump(), status_code=status.value, headers=headers)
