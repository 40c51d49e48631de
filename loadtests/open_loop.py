"""The open loop: requests are sent when they are due, whatever became of those before."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import gevent
import gevent.pool
from gevent.lock import BoundedSemaphore

from loadtests.answer import CUT, GIVEN_UP, Answer, now
from loadtests.arrivals import schedule
from loadtests.client import Chunk, cut_off
from loadtests.session import Session
from loadtests.workloads import Request, read_trace, replay

T = TypeVar("T")
AMIDST_SECONDS = 60.0
"""How long requests that a run starts amidst have to begin, where no first token is promised."""


class OpenLoop:
    """Sends requests when they are due."""

    def __init__(self, session: Session) -> None:
        self.session, self.load, self.objective = session, session.load, session.objective
        self.until = self.load.warmup + self.load.duration
        self.room = BoundedSemaphore(self.load.max_in_flight)
        self.waiting: dict[int, tuple[float, list[Chunk]]] = {}
        """The measured requests that are under way: when they were to be sent, and what came."""
        self.start, self.bad, self.hopeless = 0.0, 0, False

    def requests(self) -> Iterator[tuple[float, Request]]:
        """The share of this process: arrival in seconds, and the request, made before it is due."""
        load, workload = self.load, self.session.workload
        if load.arrival == "trace":
            yield from self._share(replay(read_trace(Path(load.trace)), workload))
            return
        arrivals = schedule(load.arrival, load.rate, load.seed, load.burst)
        for number, arrival in self._share(enumerate(arrivals)):
            yield arrival, workload.request(number)

    def _share(self, of_all: Iterator[T]) -> Iterator[T]:
        return itertools.islice(of_all, self.session.worker, None, self.session.workers)

    def run(self) -> None:
        """Send until all measured requests are answered, or the objective is out of reach."""
        is_trace = self.load.arrival == "trace"
        sending = gevent.pool.Group()
        self._go_amidst(sending)
        self.start = now()
        for number, (arrival, request) in enumerate(self.requests()):
            due = self.start + arrival
            measured = is_trace or self.load.warmup <= arrival < self.until
            while not (over := self._over(arrival)) and (left := due - now()) > 0:
                gevent.sleep(min(left, 0.05))
            if over:
                break
            if not self.room.acquire(blocking=False):
                self.session.record(
                    Answer(request.profile, request.id, due, due, now(), error="client at its cap"), request
                )
                self.bad += measured
                continue
            chunks: list[Chunk] = []
            if measured:
                self.waiting[number] = due, chunks
            sending.spawn(self._send, request, due, chunks, number)
        if is_trace:
            sending.join()
        sending.kill()

    def _go_amidst(self, sending: gevent.pool.Group) -> None:
        """Send the requests that it starts amidst, and wait until their answers go on: their prompts are of the past.

        Those that have not begun by the time promised for a first token are ended: no more are under way at once.
        """
        session, begun = self.session, list[tuple[gevent.Greenlet, list[Chunk]]]()
        amidst = session.workload.under_way(self.load.under_way)
        for number, request in enumerate(self._share(amidst)):
            self.room.acquire()
            chunks: list[Chunk] = []
            begun.append((sending.spawn(self._send, request, now(), chunks, -1 - number), chunks))
        end = now() + (self.objective.ttft if self.objective else AMIDST_SECONDS)
        while (late := [each for each, chunks in begun if not chunks and not each.dead]) and now() < end:
            gevent.sleep(0.05)
        gevent.killall(late)

    def _send(self, request: Request, due: float, chunks: list[Chunk], number: int) -> None:
        try:
            answer = self.session.ask(request, due, chunks)
            if number in self.waiting and self.objective and not answer.good(self.objective):
                self.bad += 1
        except gevent.GreenletExit:
            why = GIVEN_UP if number in self.waiting and self.hopeless else CUT
            self.session.record(cut_off(request, due, chunks, why), request)
        finally:
            self.waiting.pop(number, None)
            self.room.release()

    def _over(self, arrival: float) -> bool:
        """Whether enough is known before the request of `arrival` is sent.

        Load stays on until the last measured request is answered, or has had its time for a first token where the
        rest is cut; what is sent for that is not measured.
        """
        if self.load.arrival == "trace":
            return False
        if self.load.cut:
            grace = self.objective.ttft if self.objective else 0
            over = now() >= self.start + self.until + grace
        else:
            over = arrival >= self.until and not self.waiting
        self.hopeless = not over and self._out_of_reach()
        return over or self.hopeless

    def _out_of_reach(self) -> bool:
        """Whether more are bad already than may be, of all that will be measured."""
        if self.objective is None:
            return False
        load, ttft = self.load, self.objective.ttft
        late = sum((chunks[0][0] if chunks else now()) - due > ttft for due, chunks in self.waiting.values())
        allowed = (1 - self.objective.goodput) * load.rate * load.duration / self.session.workers
        return self.bad + late > allowed + 1
