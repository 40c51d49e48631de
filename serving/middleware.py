"""What a request meets before vLLM's routes, one concern a class.

Plain ASGI, which vLLM adds through its option `--middleware` in every API server process. Starlette's
`BaseHTTPMiddleware` would stand between vLLM and a client that goes away.
"""

import re
import uuid
from argparse import Namespace
from functools import partial

from asgi_correlation_id import CorrelationIdMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs

from serving import logs
from serving.concurrency import Concurrency
from serving.drain import Draining, drain
from serving.errors import Refused
from serving.keys import Keys
from serving.limits import Limits
from serving.metrics import HttpMetrics
from serving.request import path_of
from serving.settings import ARGUMENT, ServerSettings
from serving.tokens import count_tokens

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Asked by supervisors and scrapers, who have no key and must be answered whatever the load.
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/ping"})


class Endpoint:
    """All of ours, as the server's settings have them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.stack: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it; the first scope is the server's own, once it is configured and its loop runs."""
        if self.stack is None:
            self.stack = stack(self.app, scope["app"].state.args)
        if scope["type"] == "lifespan":
            drain.install()
            logs.install()
        await (self.stack if scope["type"] == "http" else self.app)(scope, receive, send)


def stack(app: ASGIApp, args: Namespace) -> ASGIApp:
    """What a request goes through, the last one first."""
    settings: ServerSettings = getattr(args, ARGUMENT, ServerSettings())
    metrics = HttpMetrics(args.served_model_name[0] if args.served_model_name else args.model)
    drain.seconds = settings.drain_seconds
    shared = settings.shared_by(getattr(args, "api_server_count", None) or 1)
    guarded = app
    if shared.max_concurrent_requests is not None:
        guarded = Concurrency(guarded, shared.max_concurrent_requests, shared.max_queued_requests, metrics)
    guarded = Limits(guarded, settings, partial(count_tokens, app))
    guarded = Draining(guarded, drain, metrics)
    if keys := [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]:
        guarded = Keys(guarded, keys)
    return CorrelationIdMiddleware(
        OpenPaths(app, Refusals(guarded, metrics)),
        header_name="X-Request-Id",
        validator=None,  # which would log a line outside vLLM's format
        transformer=lambda given: given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
    )


class OpenPaths:
    """Lets some paths pass all of `guarded`."""

    def __init__(self, app: ASGIApp, guarded: ASGIApp) -> None:
        self.app, self.guarded = app, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        is_open = path_of(scope) in OPEN_PATHS or scope["method"] == "OPTIONS"
        await (self.app if is_open else self.guarded)(scope, receive, send)


class Refusals:
    """Answers for what is refused, and counts it."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await self.app(scope, receive, send)
        except Refused as refused:
            self.metrics.rejected(refused.reason)
            await refused.response()(scope, receive, send)
