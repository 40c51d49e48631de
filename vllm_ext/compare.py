"""`vllm-ext compare`: stock vLLM and a planned model on one machine, in turn, with the same work.

The prompts are random token ids from a fixed seed, never the same twice, so that prefix caching cannot disguise
prefill. Times are taken by the client, from a stream that is not buffered; capacities are read off `/metrics`.
"""

import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from model_executors.attention_plan import LayerPlan
from model_executors.head_plan import Kind as HeadKind
from vllm_ext.errors import UsageError
from vllm_ext.process import free_port, running
from vllm_ext.serve import prepare
from vllm_ext.versions import vllm_distribution

SERVED_NAME = "compared"
SHORT_PROMPT_TOKENS = 32
WARM_UPS = 2
PROMPTS = 9
ANSWERS = 5


@dataclass(frozen=True)
class Work:
    """The work that both are given, in tokens and requests."""

    prompt_tokens: int = 1024
    answer_tokens: int = 128
    streams: int = 32


@dataclass(frozen=True)
class Answer:
    """One streamed answer, timed by the client; seconds from when the request was sent."""

    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.last - self.first) / (self.tokens - 1)


@dataclass
class Figures:
    """What was measured of one of the two, a value a round."""

    kv_capacity_tokens: list[float] = field(default_factory=list)
    kv_capacity_requests: list[float] = field(default_factory=list)
    prefill_tokens_per_second: list[float] = field(default_factory=list)
    time_to_first_token_ms: list[float] = field(default_factory=list)
    time_per_output_token_ms: list[float] = field(default_factory=list)
    output_tokens_per_second: list[float] = field(default_factory=list)


ROWS = {
    "kv_capacity_tokens": "KV-cache capacity, tokens",
    "kv_capacity_requests": "requests of the longest context at once",
    "kv_bytes_per_token": "KV bytes a token",
    "weight_bytes": "weight bytes",
    "prefill_tokens_per_second": "prefill, tokens/s",
    "time_to_first_token_ms": "time to first token, ms",
    "time_per_output_token_ms": "time per output token, one stream, ms",
    "output_tokens_per_second": "output, many streams, tokens/s",
}


@dataclass(frozen=True)
class Planned:
    """The model that is measured beside the stock one."""

    described: str
    """By the options that name it."""
    changes: Mapping[int, LayerPlan] | None = None
    """A plan laid over the stock checkpoint."""
    folder: str | None = None
    """A planned checkpoint."""
    head: HeadKind | None = None
    agreement: float | None = None


def compare(
    model: str, planned: Planned, vllm_args: Sequence[str], work: Work, rounds: int, json_file: Path | None
) -> None:
    """Measure both and print the table.

    Raises:
        UsageError: for a plan that does not fit, or a server that does not start.

    """
    checkpoint = prepare(model, None, vllm_args)[0]
    settings = (planned.changes, vllm_args, planned.head, planned.agreement)
    opened, overrides = prepare(planned.folder or model, *settings)
    if planned.folder is not None and opened.plan is None:
        raise UsageError(f"--planned {planned.folder}: it has no attention plan; write one with vllm-ext plan")
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: no such folder; create {json_file.parent}")
    commands = {
        "stock": _command(model, vllm_args),
        "planned": _command(planned.folder or model, vllm_args, overrides),
    }
    figures = {name: Figures() for name in commands}
    metrics: dict[str, float] = {}
    with _progress() as progress:
        task = progress.add_task("", total=2 * rounds * 4)
        for turn in range(rounds):
            # Alternate who goes first, so that neither profits from the machine's drift.
            for name in ("stock", "planned") if turn % 2 == 0 else ("planned", "stock"):
                progress.update(task, description=f"round {turn + 1}/{rounds}: {name} starts")
                port = free_port()
                with running([*commands[name], "--port", str(port)], port) as url:
                    progress.advance(task)
                    client = Client(url, checkpoint.config["vocab_size"], random.Random(turn))
                    scraped = scrape(url)
                    figures[name].kv_capacity_tokens.append(scraped["kv_capacity_tokens"])
                    figures[name].kv_capacity_requests.append(scraped["kv_capacity_requests"])
                    if name == "planned":
                        metrics = scraped
                    for what, measure in MEASURES.items():
                        progress.update(task, description=f"round {turn + 1}/{rounds}: {name}, {what}")
                        asyncio.run(measure(client, work, figures[name]))
                        progress.advance(task)
    report = _report(model, planned, vllm_args, work, rounds, figures, metrics)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    _print(report)


@dataclass
class Client:
    """Asks for completions of random prompts."""

    url: str
    vocab_size: int
    random: random.Random

    async def answer(self, client: httpx.AsyncClient, prompt_tokens: int, answer_tokens: int) -> Answer:
        """Stream one answer of exactly `answer_tokens`."""
        body = {
            "model": SERVED_NAME,
            "prompt": [self.random.randrange(self.vocab_size) for _ in range(prompt_tokens)],
            "max_tokens": answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times: list[float] = []
        tokens = 0
        start = time.perf_counter()
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise UsageError(f"the server answered {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if chunk["choices"]:
                        times.append(time.perf_counter() - start)
                    elif chunk.get("usage"):
                        tokens = chunk["usage"]["completion_tokens"]
        if tokens != answer_tokens:
            raise UsageError(f"the server answered {tokens} tokens where {answer_tokens} were asked for")
        return Answer(times[0], times[-1], tokens)

    async def answers(self, count: int, at_once: int, prompt_tokens: int, answer_tokens: int) -> list[Answer]:
        """Stream `count` answers, `at_once` of them together."""
        turn = asyncio.Semaphore(at_once)

        async def one(client: httpx.AsyncClient) -> Answer:
            async with turn:
                return await self.answer(client, prompt_tokens, answer_tokens)

        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
            return list(await asyncio.gather(*(one(client) for _ in range(count))))


async def long_prompts(client: Client, work: Work, figures: Figures) -> None:
    """One long prompt after another, a token each."""
    await client.answers(WARM_UPS, 1, work.prompt_tokens, 1)
    answers = await client.answers(PROMPTS, 1, work.prompt_tokens, 1)
    first = statistics.median(answer.first for answer in answers)
    figures.time_to_first_token_ms.append(first * 1000)
    figures.prefill_tokens_per_second.append(work.prompt_tokens / first)


async def long_answers(client: Client, work: Work, figures: Figures) -> None:
    """One long answer after another to short prompts."""
    await client.answers(1, 1, SHORT_PROMPT_TOKENS, work.answer_tokens)
    answers = await client.answers(ANSWERS, 1, SHORT_PROMPT_TOKENS, work.answer_tokens)
    figures.time_per_output_token_ms.append(statistics.median(answer.per_token for answer in answers) * 1000)


async def many_streams(client: Client, work: Work, figures: Figures) -> None:
    """Many long answers at once."""
    await client.answers(work.streams, work.streams, SHORT_PROMPT_TOKENS, 8)
    start = time.perf_counter()
    await client.answers(work.streams, work.streams, SHORT_PROMPT_TOKENS, work.answer_tokens)
    figures.output_tokens_per_second.append(work.streams * work.answer_tokens / (time.perf_counter() - start))


MEASURES = {"long prompts": long_prompts, "long answers": long_answers, "many streams": many_streams}


def _command(model: str, vllm_args: Sequence[str], overrides: dict[str, Any] | None = None) -> list[str]:
    """How to start vLLM's own server."""
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *vllm_args]
    plan = ["--hf-overrides", json.dumps(overrides)] if overrides else []
    return [*server, *plan, "--host", "127.0.0.1", "--served-model-name", SERVED_NAME]


def scrape(url: str) -> dict[str, float]:
    """The figures of `/metrics` that the table shows."""
    samples = [
        sample
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text)
        for sample in family.samples
    ]
    cache = next(sample.labels for sample in samples if sample.name == "vllm:cache_config_info")
    ours = {sample.name: sample.value for sample in samples if sample.name.startswith("vllm_ext_")}
    capacity = {
        "kv_capacity_tokens": float(cache["kv_cache_size_tokens"]),
        "kv_capacity_requests": float(cache["kv_cache_max_concurrency"]),
    }
    return ours | capacity


def _report(
    model: str,
    planned_model: Planned,
    vllm_args: Sequence[str],
    work: Work,
    rounds: int,
    figures: dict[str, Figures],
    metrics: dict[str, float],
) -> dict[str, Any]:
    stock, planned = asdict(figures["stock"]), asdict(figures["planned"])
    # The same in every round. Of quantized checkpoints the weights' bytes are not known.
    planned["kv_bytes_per_token"] = [metrics["vllm_ext_kv_cache_token_bytes"]]
    stock["kv_bytes_per_token"] = [metrics["vllm_ext_stock_kv_cache_token_bytes"]]
    if "vllm_ext_weight_bytes" in metrics:
        planned["weight_bytes"] = [metrics["vllm_ext_weight_bytes"] + metrics["vllm_ext_weight_fitted_bytes"]]
        stock["weight_bytes"] = [metrics["vllm_ext_weight_bytes"] + metrics["vllm_ext_weight_dropped_bytes"]]
    rows = {
        name: {
            "stock": statistics.median(stock[name]),
            "planned": statistics.median(planned[name]),
            # Round by round, since the machine may be faster in one round than in another.
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(planned[name], stock[name], strict=True)),
        }
        for name in ROWS
        if name in stock
    }
    return {
        "model": Path(model).name,
        "planned": planned_model.described,
        "vllm_args": list(vllm_args),
        "work": asdict(work),
        "rounds": rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "vllm": " ".join(vllm_distribution() or ("none",)),
        "rows": rows,
        "every_round": {name: asdict(figure) for name, figure in figures.items()},
    }


def _print(report: dict[str, Any]) -> None:
    work = report["work"]
    table = Table(
        title=f"{report['model']}, {report['planned']}, beside stock",
        caption=f"{report['vllm']}; {report['machine']}; prompts of {work['prompt_tokens']}, answers of "
        f"{work['answer_tokens']} tokens, {work['streams']} streams; medians of {report['rounds']} "
        "rounds in turn, ratios round by round",
    )
    table.add_column("")
    for column in ("stock", "planned", "ratio"):
        table.add_column(column, justify="right")
    for name, row in report["rows"].items():
        digits = 1 if row["stock"] < 1000 else 0
        table.add_row(
            ROWS[name], f"{row['stock']:,.{digits}f}", f"{row['planned']:,.{digits}f}", f"{row['ratio']:.3f}×"
        )
    Console(highlight=False).print(table)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
