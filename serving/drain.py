"""The end of a server: on SIGTERM requests that were accepted finish, new ones are refused, then vLLM stops.

vLLM's own drain (`--shutdown-timeout`) waits for the engine, not for the answers, and not at all in one of several API
server processes. So the signal is held back until every answer is sent, or the time is up, and handed to vLLM then.
"""

import asyncio
import logging
import signal
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import run_folder
from serving.errors import Refused
from serving.metrics import HttpMetrics

logger = logging.getLogger("vllm.vllm_ext")

# Of the time to drain, what is kept for vLLM to stop its engine.
TEARDOWN_SECONDS = 5.0
TEARDOWN_PART = 0.25


class Drain:
    """Of one API server process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.draining = False
        self.expired = False
        self.in_flight: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Take SIGTERM from vLLM; call it in the event loop, after vLLM has set its own handlers.

        SIGINT stays vLLM's, does there what SIGTERM did, and is how vLLM is told in the end.
        """
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin)
        run_folder.tell_ready()

    def _begin(self) -> None:
        if self.draining:  # told twice: at once, then
            signal.raise_signal(signal.SIGINT)
            return
        self.draining = True
        self._task = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        share = self.seconds - min(TEARDOWN_SECONDS, self.seconds * TEARDOWN_PART)
        logger.info("draining: %d requests in flight have %.0f s to finish", len(self.in_flight), share)
        if self.in_flight:
            _, late = await asyncio.wait(self.in_flight, timeout=share)
            self.expired = True
            for task in late:
                task.cancel()
            if late:
                logger.warning("draining: %d requests did not finish in time and are ended", len(late))
                await asyncio.wait(late, timeout=1)
        signal.raise_signal(signal.SIGINT)


drain = Drain()


class Draining:
    """Keeps count of what was accepted, and refuses what comes while the server drains."""

    def __init__(self, app: ASGIApp, drain: Drain, metrics: HttpMetrics) -> None:
        self.app, self.drain, self.metrics = app, drain, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if self.drain.draining:
            message = "this server is stopping; ask another"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "draining", message, close=True)
        task, started = asyncio.current_task(), False
        assert task is not None

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self.drain.in_flight.add(task)
        self.metrics.in_flight(1)
        try:
            await self.app(scope, receive, send_noting)
        except asyncio.CancelledError:
            if not self.drain.expired or started:
                raise
            message = "this server stopped before the answer was complete; ask another"
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "draining", message, close=True) from None
        finally:
            self.metrics.in_flight(-1)
            self.drain.in_flight.discard(task)
