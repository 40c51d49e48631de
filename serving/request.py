"""A request before its route has it: which path it asks for, and what of its body was read ahead."""

from collections import deque
from http import HTTPStatus

from starlette.types import Message, Receive, Scope

from serving.errors import Refused


def path_of(scope: Scope) -> str:
    """The path as routes name it, without what a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class Body:
    """A `receive` that can be read ahead: the route gets everything that was."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.held: deque[Message] = deque()

    async def __call__(self) -> Message:
        """The next message, as ASGI has it."""
        return self.held.popleft() if self.held else await self.receive()

    async def read(self, limit: int) -> bytes:
        """All of it.

        Raises:
            Refused: where it is longer than `limit` bytes, or the client went away.

        """
        content = bytearray()
        while True:
            message = await self()
            if message["type"] == "http.disconnect":
                raise gone()
            content += message.get("body", b"")
            if len(content) > limit:
                raise too_large(limit)
            if not message.get("more_body", False):
                break
        whole = bytes(content)
        self.held.append({"type": "http.request", "body": whole, "more_body": False})
        return whole

    async def disconnected(self) -> None:
        """Wait until the client goes away."""
        while (message := await self.receive())["type"] != "http.disconnect":
            self.held.append(message)


def too_large(limit: int) -> Refused:
    """What a body of more than `limit` bytes gets; the rest of it is not waited for."""
    message = f"the body is larger than {limit} bytes (--max-body-bytes)"
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body", message, close=True)


def gone() -> Refused:
    """What a client that went away would get."""
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, "disconnected", "the client went away")
