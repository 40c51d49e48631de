"""What our metrics cost: decode throughput with them and without, in one engine, in turn.

Both rounds of a pair run in the same engine, with vLLM's own metrics on, so that nothing but our logger differs. Where
noise hides so little, the bound is what a step's `record()` takes, timed by itself, as a part of the step.

    python -m serving.metrics_cost MODEL --pairs 8
"""

import asyncio
import random
import time
from statistics import median
from typing import Annotated, Any

import typer
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PerEngineStatLoggerAdapter

from serving.metrics import PlanStatLogger
from vllm_ext.errors import run_tool

CALLS = 20_000
PROMPT_TOKENS = 8


class LastStep(AggregateStatLoggerBase):
    """Keeps what loggers were given last, and counts the steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.given: tuple[Any, Any] = (None, None)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """After each step."""
        self.steps += 1
        if scheduler_stats is not None and iteration_stats is not None:
            self.given = (scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Cost:
    """Of one engine's metrics."""

    def __init__(self, engine: AsyncLLM, streams: int, tokens: int) -> None:
        assert engine.logger_manager is not None
        self.engine, self.streams, self.tokens = engine, streams, tokens
        self.manager = engine.logger_manager
        self.last = LastStep()
        self.ours = [each for each in self.manager.stat_loggers if _is_ours(each)]
        assert self.ours, "vLLM did not load this plugin's metrics"
        self.others = [*(each for each in self.manager.stat_loggers if not _is_ours(each)), self.last]
        self.requests = 0

    async def round(self, counted: bool) -> float:
        """Tokens a second of all streams."""
        self.manager.stat_loggers = self.others + (self.ours if counted else [])
        start = time.perf_counter()
        await asyncio.gather(*(self._ask() for _ in range(self.streams)))
        return self.streams * self.tokens / (time.perf_counter() - start)

    async def _ask(self) -> None:
        self.requests += 1
        chosen = random.Random(self.requests)
        prompt = TokensPrompt(prompt_token_ids=[chosen.randrange(100, 1000) for _ in range(PROMPT_TOKENS)])
        sampling = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True)
        async for _ in self.engine.generate(prompt, sampling, str(self.requests)):
            pass

    def record_seconds(self) -> float:
        """Of our logger's call after a step of decoding."""
        (ours,) = self.ours
        start = time.perf_counter()
        for _ in range(CALLS):
            ours.record(*self.last.given)
        return (time.perf_counter() - start) / CALLS


def _is_ours(logger: AggregateStatLoggerBase) -> bool:
    return isinstance(logger, PerEngineStatLoggerAdapter) and any(
        isinstance(each, PlanStatLogger) for each in logger.per_engine_stat_loggers.values()
    )


async def measure(model: str, pairs: int, streams: int, tokens: int) -> None:
    """Run the pairs, each in another order than the one before, and print what came out."""
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(model=model, enforce_eager=True, max_model_len=512, disable_log_stats=False)
    )
    cost = Cost(engine, streams, tokens)
    await cost.round(True)
    steps, start, ratios = cost.last.steps, time.perf_counter(), []
    for pair in range(pairs):
        speeds = {}
        for counted in (True, False) if pair % 2 else (False, True):
            speeds[counted] = await cost.round(counted)
        ratios.append(speeds[True] / speeds[False])
        print(f"{pair + 1}/{pairs}: {speeds[True]:.1f} tokens/s with, {speeds[False]:.1f} without: {ratios[-1]:.4f}x")
    step = (time.perf_counter() - start) / (cost.last.steps - steps)
    call = cost.record_seconds()
    print(
        f"throughput with our metrics: {median(ratios):.4f}x ({min(ratios):.4f}-{max(ratios):.4f}), {streams} streams"
    )
    print(f"record(): {call * 1e6:.1f} us of a step of {step * 1e3:.2f} ms: {call / step:.4%}")
    engine.shutdown()


def main(
    model: str,
    pairs: Annotated[int, typer.Option(min=1, help="Rounds with and without, in turn.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, max=500, help="Tokens of each answer.")] = 128,
) -> None:
    """Measure what our metrics cost in decode throughput."""
    asyncio.run(measure(model, pairs, streams, tokens))


if __name__ == "__main__":
    run_tool(main)
