"""What the users of one process share during a run: the client, what is asked, and where answers are noted."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.answer import CUT, Answer, Objective, write_line
from loadtests.client import Chunk, ask, open_client
from loadtests.options import read_options
from loadtests.settings import Load
from loadtests.tokenizers import find_texts
from loadtests.workloads import Request, Workload

TURN = 16  # Locust's rows are written this many at a time, so that others' chunks are not noted late


class Session:
    """What the users of this process share during a run."""

    def __init__(self, environment: Environment) -> None:
        self.environment, runner = environment, environment.runner
        options: Any = environment.parsed_options
        self.load = load = read_options(options, Load)
        self.objective = read_options(options, Objective) if options.ttft else None
        self.client = open_client(environment.host or "", os.environ.get("OPENAI_API_KEY"))
        self.worker, self.workers = 0, 1
        if isinstance(runner, WorkerRunner):
            self.worker, self.workers = runner.worker_index, max(options.expect_workers, 1)
        texts = None
        model = load.model or self.client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        if load.api == "chat" or load.prompts == "words":
            texts = find_texts(self.client, model, load.api, load.tokenizer)
            if not texts.exact:
                print("note: no tokenizer; prompts' lengths are approximate, a word a token", file=sys.stderr)
        text_seed = None if load.text_seed < 0 else load.text_seed
        asked = load.workload, model, load.api, load.seed, load.scale, load.vocab_size
        self.workload = Workload(*asked, texts, text_seed)
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
