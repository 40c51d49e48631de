"""API keys, asked for on every route that is not a supervisor's."""

from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from serving.errors import Refused
from serving.request import path_of


class Keys:
    """Asks for one of `keys`, as `Authorization: Bearer KEY`; on /v1/messages `x-api-key: KEY` will do."""

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self.app = app
        self.vllms = AuthenticationMiddleware(app, keys)  # which compares in constant time, but leaves routes open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        headers = MutableHeaders(scope=scope)
        if path_of(scope).startswith("/v1/messages") and "authorization" not in headers and "x-api-key" in headers:
            headers["Authorization"] = f"Bearer {headers['x-api-key']}"  # vLLM asks for it again
        if not self.vllms.verify_token(Headers(scope=scope)):
            message = "no valid API key; send one as 'Authorization: Bearer KEY'"
            raise Refused(HTTPStatus.UNAUTHORIZED, "api_key", message)
        await self.app(scope, receive, send)
