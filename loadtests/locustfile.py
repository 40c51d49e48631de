"""Locust users for any OpenAI-compatible endpoint: `locust -f loadtests/locustfile.py --host URL`.

Beside Locust's row for each request (the whole answer, from when it was meant to be sent) there are rows of type TTFT,
ITL (a gap between two chunks with tokens), TPOT (by the server's count of tokens), and `tokens in` and `tokens out`.

Closed loop: each user asks again once it is answered. Open loop (`--arrival constant|poisson|bursts|trace`): requests
are sent when the schedule says, each in a greenlet of its own, whatever became of those before; `--users` is then 1 a
process. OPENAI_API_KEY, where set, is sent as the bearer token. All else is Locust's.
"""

from locust import User, events, task  # isort: skip  (first of all, since it patches the process)

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import gevent
import gevent.pool
import httpx
from gevent.lock import BoundedSemaphore
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtests.answer import CUT, GIVEN_UP, Answer, Objective, now, write_line
from loadtests.arrivals import KINDS, schedule
from loadtests.client import Chunk, ask, cut_off, open_client
from loadtests.tokenizers import find_texts
from loadtests.workloads import NAMES, Request, Workload, read_trace, replay

T = TypeVar("T")
DONE = "open_loop_done"
AMIDST_SECONDS = 60.0
"""How long requests that a run starts amidst have to begin, where no first token is promised."""
TURN = 16  # Locust's rows are written this many at a time, so that others' chunks are not noted late


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("vllm-ext load tests")
    add = group.add_argument
    add("--workload", default="chat", choices=NAMES, help="What is asked.")
    add("--api", default="completions", choices=("completions", "chat"), help="The endpoint that is asked.")
    add("--prompts", default="ids", choices=("ids", "words"), help="What completions are asked with; chat takes words.")
    add("--model", default="", dest="served_model", help="The model's name; by default the server's first.")
    add("--scale", type=float, default=1.0, help="Multiplies all lengths.")
    add("--vocab-size", type=int, default=32000, help="Token ids are drawn below it.")
    add("--tokenizer", default="", help="A tokenizer's folder, where the server has no /tokenize.")
    add("--seed", type=int, default=0, help="For prompts, lengths and arrivals.")
    add("--text-seed", type=int, help="For prompts' texts alone; by default as --seed.")
    add("--arrival", default="closed", choices=KINDS, help="Closed loop, or how an open loop sends.")
    add("--rate", type=float, default=1.0, help="Open loop: requests a second, over all processes.")
    add("--burst", type=int, default=8, help="Open loop: requests of a burst.")
    add("--trace", default="", help="A file of JSON lines to replay: arrival, prompt_tokens, answer_tokens.")
    add("--warmup", type=float, default=0.0, help="Seconds of requests that --duration does not count.")
    add("--duration", type=float, default=60.0, help="Open loop: seconds of requests that are measured; after them it "
        "goes on until they are answered.")  # fmt: skip
    add("--under-way", type=int, default=0, help="Open loop: requests that it starts amidst, caught in the middle of "
        "their answers, so that what takes long is steady at once; the schedule begins once they go on.")  # fmt: skip
    add("--cut", action="store_true", help="Open loop: end with the measured seconds, and judge requests that are "
        "under way by what came of them.")  # fmt: skip
    add("--max-in-flight", type=int, default=2000, help="Open loop: more requests at once fail, and say so.")
    add(
        "--objective-ttft", type=float, default=0.0, help="Open loop: seconds; stop once the objective is out of reach."
    )
    add("--objective-itl", type=float, default=0.0, help="Seconds between chunks.")
    add("--objective-goodput", type=float, default=0.95, help="The part of requests that must be good.")
    add("--records", default="", help="A file for one JSON line a request; workers add their number to its name.")


class Session:
    """What the users of this process share during a run."""

    def __init__(self, environment: Environment) -> None:
        self.environment, runner = environment, environment.runner
        options: Any = environment.parsed_options
        self.options = options
        self.client = open_client(environment.host or "", os.environ.get("OPENAI_API_KEY"))
        self.worker, self.workers = 0, 1
        if isinstance(runner, WorkerRunner):
            self.worker, self.workers = runner.worker_index, max(options.expect_workers, 1)
        texts = None
        model = options.served_model or self.client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        if options.api == "chat" or options.prompts == "words":
            texts = find_texts(self.client, model, options.api, options.tokenizer)
            if not texts.exact:
                print("note: no tokenizer; prompts' lengths are approximate, a word a token", file=sys.stderr)
        asked = options.workload, model, options.api, options.seed, options.scale, options.vocab_size
        self.workload = Workload(*asked, texts, options.text_seed)
        self.numbers = itertools.count(self.worker, self.workers)
        self.file = None
        if options.records:
            path = Path(options.records)
            name = f"{path.stem}-{self.worker}{path.suffix}" if isinstance(runner, WorkerRunner) else path.name
            self.file = path.with_name(name).open("w")

    def ask(self, request: Request, intended: float, chunks: list[Chunk]) -> Answer:
        """Send it, and put what came into Locust's rows and the records."""
        answer = ask(self.client, request, intended, chunks)
        self.record(answer, request)
        return answer

    def record(self, answer: Answer, request: Request) -> None:
        """Put it into the records, and into Locust's rows unless it was cut off."""
        if self.file:
            self.file.write(write_line(answer))
        if answer.error == CUT:
            return
        name = f"{request.path} {request.profile}"
        rows: list[tuple[str, float, int]] = []
        if answer.times:
            rows.append(("TTFT", answer.ttft * 1000, 0))
            rows += [("ITL", gap * 1000, 0) for gap in answer.gaps]
        if answer.tpot is not None:
            rows.append(("TPOT", answer.tpot * 1000, 0))
        if answer.error is None:
            rows.append(("tokens in", answer.prompt_tokens, answer.prompt_tokens))
            rows.append(("tokens out", answer.answer_tokens, answer.answer_tokens))
        fire = self.environment.events.request.fire
        error = RuntimeError(answer.error) if answer.error else None
        context: dict[str, Any] = {}
        fire(
            request_type="POST",
            name=name,
            response_time=answer.latency * 1000,
            response_length=answer.size,
            exception=error,
            context=context,
        )
        for number, (kind, value, length) in enumerate(rows):
            if number % TURN == TURN - 1:
                gevent.sleep(0)
            fire(
                request_type=kind,
                name=name,
                response_time=value,
                response_length=length,
                exception=None,
                context=context,
            )

    def close(self) -> None:
        """Write out what is left."""
        if self.file:
            self.file.close()
            self.file = None


class OpenLoop:
    """Sends requests when they are due."""

    def __init__(self, session: Session) -> None:
        self.session, options = session, session.options
        self.warmup, self.until = options.warmup, options.warmup + options.duration
        self.objective = None
        if options.objective_ttft:
            self.objective = Objective(options.objective_ttft, options.objective_itl, options.objective_goodput)
        self.room = BoundedSemaphore(options.max_in_flight)
        self.waiting: dict[int, tuple[float, list[Chunk]]] = {}
        """The measured requests that are under way: when they were to be sent, and what came."""
        self.start, self.bad, self.hopeless = 0.0, 0, False

    def requests(self) -> Iterator[tuple[float, Request]]:
        """The share of this process: arrival in seconds, and the request, made before it is due."""
        options, workload = self.session.options, self.session.workload
        if options.arrival == "trace":
            yield from self._share(replay(read_trace(Path(options.trace)), workload))
            return
        arrivals = schedule(options.arrival, options.rate, options.seed, options.burst)
        for number, arrival in self._share(enumerate(arrivals)):
            yield arrival, workload.request(number)

    def _share(self, of_all: Iterator[T]) -> Iterator[T]:
        return itertools.islice(of_all, self.session.worker, None, self.session.workers)

    def run(self) -> None:
        """Send until all measured requests are answered, or the objective is out of reach."""
        is_trace = self.session.options.arrival == "trace"
        sending = gevent.pool.Group()
        self._go_amidst(sending)
        self.start = now()
        for number, (arrival, request) in enumerate(self.requests()):
            due = self.start + arrival
            measured = is_trace or self.warmup <= arrival < self.until
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
        amidst = session.workload.under_way(session.options.under_way)
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
        if self.session.options.arrival == "trace":
            return False
        if self.session.options.cut:
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
        options, ttft = self.session.options, self.objective.ttft
        late = sum((chunks[0][0] if chunks else now()) - due > ttft for due, chunks in self.waiting.values())
        allowed = (1 - self.objective.goodput) * options.rate * options.duration / self.session.workers
        return self.bad + late > allowed + 1


class OpenAIUser(User):
    """Asks for streamed chat or completions."""

    @task
    def ask(self) -> None:
        """One request after another; in an open loop the schedule asks instead."""
        session: Session | None = getattr(self.environment, "session", None)
        if session is None:  # it could not start, and said why
            raise StopUser
        if session.options.arrival != "closed":
            raise StopUser
        request = session.workload.request(next(session.numbers))
        intended, chunks = now(), list[Chunk]()
        try:
            session.ask(request, intended, chunks)
        except gevent.GreenletExit:
            session.record(cut_off(request, intended, chunks), request)
            raise


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, MasterRunner):
        return
    try:
        environment.session = session = Session(environment)  # type: ignore[attr-defined]
    except (ValueError, httpx.HTTPError) as error:
        print(f"error: {environment.host}: {error}", file=sys.stderr)
        environment.process_exit_code = 2
        gevent.spawn(_end, environment)
        return
    if session.options.arrival != "closed":
        gevent.spawn(_open_loop, environment, session)


def _open_loop(environment: Environment, session: Session) -> None:
    OpenLoop(session).run()
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message(DONE)
    else:
        _end(environment)


def _end(environment: Environment) -> None:
    """A run with a web page stops, one without ends Locust."""
    assert environment.runner is not None
    if environment.web_ui:
        environment.runner.stop()
    else:
        environment.runner.quit()


@events.init.add_listener
def _listen(environment: Environment, **_: Any) -> None:
    runner = environment.runner
    if not isinstance(runner, MasterRunner):
        return
    done: set[str] = set()

    def one_done(environment: Environment, msg: Any, **_: Any) -> None:
        done.add(msg.node_id)
        if len(done) >= len(runner.clients):
            done.clear()
            gevent.spawn(_end, environment)

    runner.register_message(DONE, one_done)


@events.test_stop.add_listener
@events.quitting.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    session = getattr(environment, "session", None)
    if session is not None:
        session.close()
