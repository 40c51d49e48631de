"""What the users of one process share during a run: the client, what is asked, and where answers are noted."""

import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.answer import CUT, Answer, Objective, write_line
from loadtests.client import Chunk, Stream, Streams, cut_off, open_client
from loadtests.conversations import Request
from loadtests.options import read_options
from loadtests.settings import Load
from loadtests.tokenizers import find_texts
from loadtests.watch import Watch

TURN = 16  # Locust's rows are written this many at a time, so that others' chunks are not noted late


class Session:
    """What the users of this process share during a run."""

    def __init__(self, environment: Environment) -> None:
        self.environment, runner = environment, environment.runner
        options: Any = environment.parsed_options
        self.load = load = read_options(options, Load)
        self.objective = read_options(options, Objective) if options.ttft else None
        self.bound = options.client_bound
        host = environment.host or ""
        self.streams = Streams(host, load.max_in_flight)
        self.worker, self.workers = 0, 1
        if isinstance(runner, WorkerRunner):
            self.worker, self.workers = runner.worker_index, max(options.expect_workers, 1)
        texts = None
        self.client = open_client(host)
        model = load.model or self.client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        if load.api == "chat" or load.prompts == "words":
            texts = find_texts(self.client, model, load.api, load.tokenizer)
            if not texts.exact:
                print("note: no tokenizer; prompts' lengths are approximate, a word a token", file=sys.stderr)
        self.workload = load.asks(model, texts)
        self.numbers = itertools.count(self.worker, self.workers)
        self.file = None
        self.start = 0.0
        """When the open loop's schedule began."""
        if options.records:
            path = Path(options.records)
            name = f"{path.stem}-{self.worker}{path.suffix}" if isinstance(runner, WorkerRunner) else path.name
            self.file = path.with_name(name).open("w")
        self.watch = Watch()
        self.writing = gevent.pool.Group()
        """What writes Locust's rows: not the users, whom the end of a run kills."""

    def ask(self, request: Request, intended: float, chunks: list[Chunk]) -> tuple[Answer, Stream]:
        """Send it, and put what came into Locust's rows and the records."""
        answer, stream = self.streams.ask(request, intended, chunks)
        self.watch.late.append(answer.sent - intended)
        self.record(answer, request)
        return answer, stream

    def cut_off(self, request: Request, intended: float, chunks: list[Chunk], why: str = CUT) -> None:
        """Record what came of a request that is not waited for any longer."""
        self.record(cut_off(request, intended, chunks, why), request)

    def record(self, answer: Answer, request: Request) -> None:
        """Put it into the records, and into Locust's rows unless it was cut off."""
        if self.file:
            self.file.write(write_line(answer))
        if answer.error != CUT:
            self.writing.spawn(self._write_rows, answer, request)

    def _write_rows(self, answer: Answer, request: Request) -> None:
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
        if answer.right is not None:
            rows.append(("needles", 100.0 * answer.right, 0))
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
        """Write out what is left, and say if the run is void."""
        self.client.close()
        self.writing.join()
        client = self.watch.stop()
        if self.file:
            self.file.write(json.dumps({"client": asdict(client), "start": self.start}) + "\n")
            self.file.close()
            self.file = None
        if why := client.void(self.bound):
            print(f"void: {why}", file=sys.stderr)
            self.environment.process_exit_code = 3
