"""What a measurement's process does: one engine, given one piece of work after another.

The engine runs in this very process, so that its steps can be timed one by one, without a network or a second process
that takes turns with it. What HTTP adds is the same for stock and variant; `loadtests` measures it. Prompts are from a
fixed seed, never the same twice, so that the prefix cache finds nothing.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from model_executors.attention_plan import CONFIG_KEY
from vllm_ext import openmp
from vllm_ext.bench.run import Asked
from vllm_ext.bench.work import SETTLING_STEPS, Work
from vllm_ext.engine import engine_args


class Bench:
    """Gives an engine work and times its steps."""

    def __init__(self, engine: Any, seed: int, prose: Sequence[int] = ()) -> None:
        """Prompts are cut from the token ids of `prose`, or without any are random."""
        self.engine, self.prose = engine, prose
        self.random = random.Random(seed)
        self.vocab_size = engine.model_config.get_vocab_size()
        self.requests = 0

    def prompt(self, tokens: int) -> list[int]:
        """So many token ids."""
        if not self.prose:
            return [self.random.randrange(3, self.vocab_size) for _ in range(tokens)]
        start = self.random.randrange(len(self.prose) - tokens + 1)
        return list(self.prose[start : start + tokens])

    def add(self, prompt_tokens: int, answer_tokens: int) -> str:
        """Queue one greedy request; returns its id."""
        from vllm import SamplingParams

        self.requests += 1
        name, prompt = str(self.requests), self.prompt(prompt_tokens)
        sampling = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def step(self) -> tuple[float, dict[str, int]]:
        """Seconds of one step, and how many tokens each request has been answered by now."""
        start = time.perf_counter()
        outputs = self.engine.step()
        return time.perf_counter() - start, {each.request_id: len(each.outputs[0].token_ids) for each in outputs}

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.engine.has_unfinished_requests():
            self.step()

    def generating(self, streams: int, context: int, answer_tokens: int) -> None:
        """Prefill that many requests, until each has had some steps of its own."""
        names = {self.add(context, answer_tokens) for _ in range(streams)}
        while names:
            names -= self.step()[1].keys()
        for _ in range(SETTLING_STEPS - 2):
            self.step()

    def time(self, work: Work, repeats: int) -> Iterator[float]:
        """Seconds of a step of the work, or of a whole prompt, several times."""
        if work.streams:
            self.generating(work.streams, work.context, work.answer_tokens(repeats))
        for _ in range(work.samples(repeats)):
            if work.kind == "decode":
                seconds, answered = self.step()
                if answered and len(answered) < work.streams:
                    raise ValueError(
                        f"--work {work}: of {work.streams} streams only {len(answered)} fit in the KV cache or in "
                        "--max-num-seqs; choose fewer, or give more"
                    )
                yield seconds
                continue
            name, spent, answered = self.add(work.prompt, 1), 0.0, dict[str, int]()
            while name not in answered:
                seconds, answered = self.step()
                spent += seconds
            yield spent
        self.run()


def work(connection: Connection, asked: Asked) -> None:
    """Measure a step, or a whole prompt, for each message, and tell of it; ends when all is measured."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    candidate, settings = asked.candidate, asked.settings
    arguments = engine_args(candidate.served, candidate.vllm_args)
    # This process has one engine.
    arguments.additional_config = {CONFIG_KEY: {"compile_sums": openmp.preloaded()}} | arguments.additional_config
    engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
    config: Any = engine.vllm_config

    def tell(message: Any) -> None:
        connection.send(message)
        connection.recv()

    tell(
        {
            "ready": time.time(),
            "kv_capacity_tokens": config.cache_config.kv_cache_size_tokens,
            "max_model_len": config.model_config.max_model_len,
            "element_bytes": config.model_config.dtype.itemsize,
            "threads": len(os.sched_getaffinity(0)),
        }
    )
    bench = Bench(engine, asked.seed, candidate.prose)
    bench.add(64, 4)
    bench.run()
    for text in settings.work:
        work = Work.parse(text)
        warm_up = Work(work.kind, min(work.prompt, 64), work.streams, min(work.context, 32))
        for _ in bench.time(warm_up, 1):
            pass
        for seconds in bench.time(work, settings.repeats):
            tell((text, seconds))
    engine.engine_core.shutdown()
