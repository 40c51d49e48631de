"""Refusals in the form of OpenAI's errors."""

from http import HTTPStatus
from typing import Literal, get_args

from starlette.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

RETRY_SECONDS = 1
Reason = Literal[
    "api_key", "body", "concurrency", "disconnected", "draining", "n", "output_tokens", "prompt_tokens", "schema"
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Refused(Exception):  # noqa: N818 - as starlette names its own
    """A request that is refused: the status, why in one word for the counter, and what to do about it."""

    def __init__(
        self, status: HTTPStatus, reason: Reason, message: str, param: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.param, self.close = status, reason, param, close

    def response(self) -> JSONResponse:
        """The answer; one that says when to try again where that helps, and ends the connection where it must."""
        response = error_response(self.status, str(self), self.param)
        if self.close:
            response.headers["Connection"] = "close"
        return response


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
