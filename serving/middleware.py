"""What stands before vLLM's routes: a request id, the keys, the limits, and the end of the server.

A plain ASGI middleware, which vLLM adds through its option `--middleware` in every API server process. Starlette's
`BaseHTTPMiddleware` would stand between vLLM and a client that goes away.
"""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from serving import limits, logs
from serving.drain import drain
from serving.errors import Refused
from serving.metrics import HttpMetrics
from serving.settings import ARGUMENT, ServerSettings

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Asked by supervisors and scrapers, who have no key and must be answered whatever the load.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/ping", "/version", "/load"})


class RequestGuard:
    """Answers what must not reach vLLM; everything else passes unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.gate: Gate | None = None

    def _start(self, scope: Scope) -> None:
        """Read the settings, once the server is configured and its loop runs."""
        state = scope["app"].state
        args = state.args
        processes = getattr(args, "api_server_count", None) or 1
        self.settings = getattr(args, ARGUMENT, ServerSettings())
        self.metrics = HttpMetrics(args.served_model_name[0] if args.served_model_name else args.model)
        tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        # vLLM compares keys in constant time, but asks for them on some of its routes only.
        self.keys = AuthenticationMiddleware(self.app, tokens) if tokens else None
        self.gate = Gate(self.settings.shared_by(processes), self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if self.gate is None:
            self._start(scope)
        if scope["type"] == "lifespan":
            drain.install(self.settings.drain_seconds)
            logs.install()
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope, send = self._identified(scope, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            await self._serve(scope, receive, send)
        except Refused as refused:
            self.metrics.rejected(refused.reason)
            response = refused.response()
            if drain.draining or refused.reason == "body":
                response.headers["Connection"] = "close"
            await response(scope, receive, send)

    def _identified(self, scope: Scope, send: Send) -> tuple[Scope, Send]:
        """The request with an id that vLLM will use too, and the answer with the same."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        logs.request_id.set(request_id)
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        scope = {**scope, "headers": [*others, (b"x-request-id", request_id.encode())]}

        async def send_identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])["X-Request-Id"] = request_id
            await send(message)

        return scope, send_identified

    def _admit(self, scope: Scope) -> None:
        """Raise Refused without having read the body."""
        if drain.draining:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "draining", "this server is stopping; ask another")
        headers = Headers(scope=scope)
        if self.keys is not None and not self.keys.verify_token(headers):
            message = "no valid API key; send one as 'Authorization: Bearer KEY'"
            raise Refused(HTTPStatus.UNAUTHORIZED, "api_key", message)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        message = f"the body is larger than {self.settings.max_body_bytes} bytes (--max-body-bytes)"
        return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body", message)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the body, wait for a place, and hand over."""
        assert self.gate is not None
        task, started = asyncio.current_task(), False
        assert task is not None

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        drain.in_flight.add(task)
        self.metrics.in_flight(1)
        try:
            content = await self._read(receive)
            if content is None:
                return
            await self._check(scope, content)
            replayed = Replayed(content, receive)
            async with self.gate.place(replayed):
                await self.app(scope, replayed, send_noting)
        except asyncio.CancelledError:
            if not drain.expired or started:
                raise
            message = "this server stopped before the answer was complete; ask another"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "draining", message) from None
        finally:
            self.metrics.in_flight(-1)
            drain.in_flight.discard(task)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        content = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            content += message.get("body", b"")
            if len(content) > self.settings.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(content)

    async def _check(self, scope: Scope, content: bytes) -> None:
        if not content or scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        body = limits.parse(content)
        limits.check(body, self.settings)
        if self.settings.max_prompt_tokens is not None and scope["path"] not in ("/tokenize", "/detokenize"):

            async def count(prompt: dict[str, Any]) -> int:
                return await count_tokens(self.app, scope, prompt)

            await limits.check_prompt(body, self.settings.max_prompt_tokens, count)


class Replayed:
    """A `receive` that gives a body that was read already, and then what comes after it."""

    def __init__(self, content: bytes, receive: Receive) -> None:
        self.content: bytes | None = content
        self.receive = receive
        self.after: asyncio.Task[Message] | None = None

    async def __call__(self) -> Message:
        """The next message."""
        if self.content is not None:
            content, self.content = self.content, None
            return {"type": "http.request", "body": content, "more_body": False}
        return await self.next()

    async def next(self) -> Message:
        """The message after the body, which is that the client went away; the same one each time."""
        if self.after is None:
            self.after = asyncio.ensure_future(self.receive())
        return await asyncio.shield(self.after)


class Gate:
    """Places for requests at once, and for those that wait for one."""

    def __init__(self, settings: ServerSettings, metrics: HttpMetrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.places = asyncio.Semaphore(settings.max_concurrent_requests or 1)
        self.waiting = 0

    @asynccontextmanager
    async def place(self, request: Replayed) -> AsyncIterator[None]:
        """Hold a place.

        Raises:
            Refused: where all are taken and as many wait as may, or the client went away.

        """
        limit = self.settings.max_concurrent_requests
        if limit is None:
            yield
            return
        if self.places.locked():
            if self.waiting >= self.settings.max_queued_requests:
                message = (
                    f"{limit} requests are being answered and {self.waiting} wait, which is all that this server takes "
                    "(--max-concurrent-requests, --max-queued-requests); try again"
                )
                raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "concurrency", message)
            await self._wait(request)
        else:
            await self.places.acquire()
        try:
            yield
        finally:
            self.places.release()

    async def _wait(self, request: Replayed) -> None:
        self.waiting += 1
        self.metrics.queued(1)
        place, gone = asyncio.ensure_future(self.places.acquire()), asyncio.ensure_future(request.next())
        try:
            await asyncio.wait({place, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "disconnected", "the client went away")
        except BaseException:
            if place.done() and not place.cancelled():
                self.places.release()
            place.cancel()
            raise
        finally:
            gone.cancel()
            self.waiting -= 1
            self.metrics.queued(-1)


async def _never() -> Message:
    """A client that does not go away: vLLM asks for that again and again."""
    await asyncio.Event().wait()
    raise AssertionError


async def count_tokens(app: ASGIApp, scope: Scope, prompt: dict[str, Any]) -> int:
    """What vLLM's own /tokenize counts, asked without leaving the process.

    Raises:
        Refused: for a prompt that it refuses.

    """
    content = json.dumps(prompt).encode()
    replaced = (b"content-length", b"content-type", b"content-encoding")
    others = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    stated = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
    headers = [*others, *stated]
    asked = {**scope, "path": "/tokenize", "raw_path": b"/tokenize", "query_string": b"", "headers": headers}
    status, answer = 500, bytearray()

    replayed = Replayed(content, _never)

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    try:
        await app(asked, replayed, send)
    finally:
        if replayed.after is not None:
            replayed.after.cancel()
    said = json.loads(bytes(answer))
    if status != HTTPStatus.OK:
        message = said.get("error", {}).get("message", "the prompt cannot be read")
        raise Refused(HTTPStatus(status), "prompt_tokens", message)
    return int(said["count"])
