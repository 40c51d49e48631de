"""How many tokens a prompt has, as vLLM's own /tokenize counts them."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from serving.errors import Refused

REPLACED = (b"content-length", b"content-type", b"content-encoding", b"transfer-encoding")


async def count_tokens(app: ASGIApp, scope: Scope, prompt: dict[str, Any]) -> int:
    """Ask without leaving the process, for the request of `scope`.

    Raises:
        Refused: for a prompt that it refuses.

    """
    content = json.dumps(prompt).encode()
    stated = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
    headers = [*((name, value) for name, value in scope["headers"] if name.lower() not in REPLACED), *stated]
    asked = {**scope, "path": "/tokenize", "raw_path": b"/tokenize", "query_string": b"", "headers": headers}
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    status, answer = 500, bytearray()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # a client that does not go away: vLLM asks for that again and again
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    await app(asked, receive, send)
    said = json.loads(bytes(answer))
    if status != HTTPStatus.OK:
        message = said.get("error", {}).get("message", "the prompt cannot be read")
        raise Refused(HTTPStatus(status), "prompt_tokens", message)
    return int(said["count"])
