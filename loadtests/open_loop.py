"""The open loop: requests are sent when they are due, whatever became of those before."""

import itertools
from collections.abc import Iterator
from typing import TypeVar

import gevent
import gevent.pool
from gevent.lock import BoundedSemaphore

from loadtests.answer import CUT, GIVEN_UP, Answer, now
from loadtests.client import Chunk
from loadtests.conversations import Conversation, History, Request
from loadtests.session import Session

T = TypeVar("T")
AMIDST_SECONDS = 60.0
"""How long requests that a run starts amidst have to begin, where no first token is promised."""


class OpenLoop:
    """Sends conversations when they are due, and their later turns when their users have thought."""

    def __init__(self, session: Session) -> None:
        self.session, self.load, self.objective = session, session.load, session.objective
        self.until = self.load.warmup + self.load.duration
        self.room = BoundedSemaphore(self.load.max_in_flight)
        self.waiting: dict[str, tuple[float, list[Chunk]]] = {}
        """The measured requests that are under way: when they were to be sent, and what came."""
        self.start, self.bad, self.hopeless = 0.0, 0, False

    def _share(self, of_all: Iterator[T]) -> Iterator[T]:
        """Of this process: each is made before it is due."""
        return itertools.islice(of_all, self.session.worker, None, self.session.workers)

    def run(self) -> None:
        """Send until all measured requests are answered, or the objective is out of reach."""
        sending = gevent.pool.Group()
        self._go_amidst(sending)
        self.start = self.session.start = now()
        for arrival, conversation in self._share(self.load.sends(self.session.workload)):
            due = self.start + arrival
            while not (over := self._over(arrival)) and (left := due - now()) > 0:
                gevent.sleep(min(left, 0.05))
            if over:
                break
            sending.spawn(self._talk, conversation, due)
            gevent.sleep(0)  # so that it is sent, and known to be waited for
        if self.load.once:
            sending.join()
        sending.kill()

    def _talk(self, conversation: Conversation, due: float) -> None:
        """Ask turn after turn; turns from before the start count as answered."""
        history = History(conversation)
        if due < self.start:
            turn_seconds = self.load.turn_seconds(self.session.workload)
            while not history.over and due < self.start:
                history.skip(history.turn + 1)
                due += max(turn_seconds, 1e-3)
        while not history.over:
            if (left := due - now()) > 0:
                gevent.sleep(left)
            answer, text, token_ids = self._send(history.request(), due)
            if answer.error is not None:
                return
            history.add_stream(text, token_ids)
            if not history.over:
                due = answer.end + conversation.turns[history.turn].think

    def _send(self, request: Request, due: float) -> tuple[Answer, str, tuple[int, ...]]:
        measured = self.load.once or self.load.warmup <= due - self.start < self.until
        if not self.room.acquire(blocking=False):
            answer = Answer(request.profile, request.id, due, due, now(), error="client at its cap")
            self.session.record(answer, request)
            self.bad += measured
            return answer, "", ()
        chunks: list[Chunk] = []
        if measured:
            self.waiting[request.id] = due, chunks
        try:
            answer, stream = self.session.ask(request, due, chunks)
            if measured and self.objective and not answer.good(self.objective):
                self.bad += 1
        except gevent.GreenletExit:
            why = GIVEN_UP if request.id in self.waiting and self.hopeless else CUT
            self.session.cut_off(request, due, chunks, why)
            raise
        finally:
            self.waiting.pop(request.id, None)
            self.room.release()
        return answer, stream.text, stream.token_ids

    def _go_amidst(self, sending: gevent.pool.Group) -> None:
        """Send the requests that it starts amidst, and wait until their answers go on: their prompts are of the past.

        Those that have not begun by the time promised for a first token are ended: no more are under way at once.
        """
        begun = list[tuple[gevent.Greenlet, list[Chunk]]]()
        for request in self._share(self.session.workload.under_way(self.load.under_way)):
            self.room.acquire()
            chunks: list[Chunk] = []
            begun.append((sending.spawn(self._ask_amidst, request, chunks), chunks))
        end = now() + (self.objective.ttft if self.objective else AMIDST_SECONDS)
        while (late := [each for each, chunks in begun if not chunks and not each.dead]) and now() < end:
            gevent.sleep(0.05)
        gevent.killall(late)

    def _ask_amidst(self, request: Request, chunks: list[Chunk]) -> None:
        sent = now()
        try:
            self.session.ask(request, sent, chunks)
        except gevent.GreenletExit:
            self.session.cut_off(request, sent, chunks)
        finally:
            self.room.release()

    def _over(self, arrival: float) -> bool:
        """Whether enough is known before the request of `arrival` is sent.

        Load stays on until the last measured request is answered, or where answers are cut has begun to be, or has had
        its time for that; what is sent meanwhile is not measured.
        """
        if self.load.once:
            return False
        if self.load.cut:
            begun = all(chunks for _, chunks in self.waiting.values())
            grace = self.objective.ttft if self.objective and not begun else 0
            over = now() >= self.start + self.until + grace
        else:
            over = arrival >= self.until and now() >= self.start + self.until and not self.waiting
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
