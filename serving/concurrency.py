"""How many requests are answered at once, and how many may wait for that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import Refused
from serving.metrics import HttpMetrics
from serving.request import Body, gone


class Concurrency:
    """Gives `places` to requests, lets `queued` more wait, and refuses the others."""

    def __init__(self, app: ASGIApp, places: int, queued: int, metrics: HttpMetrics) -> None:
        self.app, self.limit, self.queued, self.metrics = app, places, queued, metrics
        self.places = asyncio.Semaphore(places)
        self.waiting = 0
        metrics.may_queue(queued)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        body = Body(receive)
        async with self._place(body):
            await self.app(scope, body, send)

    @asynccontextmanager
    async def _place(self, body: Body) -> AsyncIterator[None]:
        """Hold a place.

        Raises:
            Refused: where all are taken and as many wait as may, or the client went away.

        """
        if not self.places.locked():
            await self.places.acquire()
        elif self.waiting < self.queued:
            await self._wait(body)
        else:
            message = (
                f"{self.limit} requests are being answered and {self.waiting} wait, all that this server takes "
                "(--max-concurrent-requests, --max-queued-requests); try again"
            )
            raise Refused(HTTPStatus.TOO_MANY_REQUESTS, "concurrency", message)
        try:
            yield
        finally:
            self.places.release()

    async def _wait(self, body: Body) -> None:
        self.waiting += 1
        self.metrics.queued(1)
        place, left = asyncio.ensure_future(self.places.acquire()), asyncio.ensure_future(body.disconnected())
        try:
            await asyncio.wait({place, left}, return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise gone()
        except BaseException:
            if place.done() and not place.cancelled():
                self.places.release()
            place.cancel()
            raise
        finally:
            left.cancel()
            self.waiting -= 1
            self.metrics.queued(-1)
