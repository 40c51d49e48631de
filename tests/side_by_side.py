"""Engines in processes of their own: several at once, for a card that has room for many; on a CPU in one, in turn."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.answers import Answer
from tests.triton_interpreter import interpret

SECONDS = 280
"""For one engine, from its start to its end."""


@dataclass(frozen=True)
class Ask:
    """Prompts in one batch, and how they are sampled: settings of `SamplingParams`, and a pattern to hold to."""

    prompts: list[list[int]]
    sampling: dict[str, Any] = field(default_factory=dict)
    regex: str | None = None


@dataclass(frozen=True)
class Job:
    """One engine, and what it is asked, one after the other."""

    folder: Path
    settings: dict[str, Any]
    asks: tuple[Ask, ...]
    environment: dict[str, str] = field(default_factory=dict)
    within: tuple[Callable[[], AbstractContextManager[None]], ...] = ()
    """What of its process is changed meanwhile."""


@dataclass(frozen=True)
class Done:
    """What it answered, an ask each, and vLLM's counters in the end."""

    answers: list[list[Answer]]
    counters: dict[str, int]


def run(jobs: Mapping[str, Job], at_once: int) -> "dict[str, Future[Done]]":
    """Run all jobs; a job that fails harms no other, and raises when its result is asked for."""
    with ThreadPoolExecutor(at_once) as threads:
        return {name: threads.submit(_apart, job) for name, job in jobs.items()}


def run_interpreted(jobs: Mapping[str, Job]) -> "dict[str, Future[Done]]":
    """Run all jobs under Model Runner V2 on a CPU; a job that fails harms no other."""
    with ProcessPoolExecutor(1, get_context("spawn"), interpret) as pool:
        return {name: pool.submit(_engine, job) for name, job in jobs.items()}


def _apart(job: Job) -> Done:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_engine, job).result(timeout=SECONDS)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise


def _engine(job: Job) -> Done:
    """In another process than the tests', with few threads, and what it compiles in a folder of its own."""
    with TemporaryDirectory() as cache, ExitStack() as stack:
        for change in job.within:
            stack.enter_context(change())
        few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        tried = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_EXT_UNPROVED": "1", "VLLM_CACHE_ROOT": cache}
        os.environ |= {**few, **os.environ, **tried, **job.environment}
        from tests.engines import end_kept

        try:
            return _asked(job)
        finally:
            end_kept()


def _asked(job: Job) -> Done:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.metrics.reader import Counter

    from tests.engines import engine

    done = []
    with engine(job.folder, disable_log_stats=False, **job.settings) as llm:
        for ask in job.asks:
            held = None if ask.regex is None else StructuredOutputsParams(regex=ask.regex)
            defaults = {"temperature": 0, "logprobs": 0, "ignore_eos": held is None, "detokenize": False}
            sampling = SamplingParams(**defaults | ask.sampling, structured_outputs=held)
            given = llm.generate([{"prompt_token_ids": each} for each in ask.prompts], sampling, use_tqdm=False)
            answers = []
            for output in (each.outputs[0] for each in given):
                chosen = zip(output.logprobs, output.token_ids, strict=True)
                answers.append(Answer(list(output.token_ids), [row[token].logprob for row, token in chosen], []))
            done.append(answers)
        counters = {each.name: each.value for each in llm.get_metrics() if isinstance(each, Counter)}
    return Done(done, counters)
