"""Locust users for any OpenAI-compatible endpoint: `locust -f loadtests/locustfile.py --host URL`.

Beside Locust's row for each request (the whole answer, from when it was meant to be sent) there are rows of type TTFT,
ITL (a gap between two chunks with tokens), TPOT (by the server's count of tokens), and `tokens in` and `tokens out`.

Closed loop: each user asks again once it is answered. Open loop (`--arrival constant|poisson|bursts|trace`): requests
are sent when the schedule says, each in a greenlet of its own, whatever became of those before; `--users` is then 1 a
process. OPENAI_API_KEY, where set, is sent as the bearer token. All else is Locust's.
"""

from locust import User, events, task  # isort: skip  (first of all, since it patches the process)

import logging
import sys
from typing import Any

import gevent
import httpx
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtests.answer import Objective, now
from loadtests.client import Chunk
from loadtests.conversations import History
from loadtests.open_loop import OpenLoop
from loadtests.options import add_options
from loadtests.session import Session
from loadtests.settings import Load
from loadtests.watch import BOUND

DONE = "open_loop_done"
logging.getLogger("httpx").setLevel(logging.WARNING)  # which has a line for each request


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    # On the parser itself: Locust's web page leaves out what is in a group of ours.
    add_options(parser, Load, arrival="closed", warmup=0.0, duration=60.0)
    add_options(parser, Objective, ttft=0.0)
    told = "Seconds at the median by which this client's own times may be wrong; beyond, a run is void (exit 3)."
    parser.add_argument("--client-bound", type=float, default=BOUND, help=f"{told} Default: {BOUND:g}.")
    parser.add_argument("--records", default="", help="A file for one JSON line a request; workers add their number.")


class OpenAIUser(User):
    """Asks for streamed chat or completions."""

    @task
    def ask(self) -> None:
        """One request after another; in an open loop the schedule asks instead."""
        session: Session | None = getattr(self.environment, "session", None)
        if session is None:  # it could not start, and said why
            raise StopUser
        if not session.load.closed:
            raise StopUser
        history = History(session.workload.conversation(next(session.numbers)))
        while not history.over:
            request = history.request()
            intended, chunks = now(), list[Chunk]()
            try:
                answer, stream = session.ask(request, intended, chunks)
            except gevent.GreenletExit:
                session.cut_off(request, intended, chunks)
                raise
            if answer.error is not None:
                return
            history.add_stream(stream.text, stream.token_ids)
            if not history.over:
                gevent.sleep(history.conversation.turns[history.turn].think)


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
    if not session.load.closed:
        gevent.spawn(_open_loop, environment, session)


def _open_loop(environment: Environment, session: Session) -> None:
    try:
        OpenLoop(session).run()
    except (ValueError, httpx.HTTPError) as error:
        print(f"error: {environment.host}: {error}", file=sys.stderr)
        environment.process_exit_code = 2
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
    session = environment.__dict__.pop("session", None)
    if session is not None:
        session.close()
