"""What was measured, beside the ideal: a table, and JSON."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from model_executors.attention_plan import AttentionPlan
from model_executors.heads.head_plan import HeadPlan
from vllm_ext.bench.machine import Machine
from vllm_ext.bench.run import BenchSettings, Round
from vllm_ext.bench.work import Work
from vllm_ext.costs import Shape, parts
from vllm_ext.versions import vllm_distribution

RESAMPLES = 2_000


@dataclass(frozen=True)
class Row:
    """One figure of stock and variant."""

    name: str
    unit: str
    stock: float
    variant: float
    gain: float
    """How many times better the variant is: stock's time by the variant's, the variant's capacity by stock's. The
    median over rounds of each round's.
    """
    interval: tuple[float, float] | None
    """95%, bootstrapped over rounds; None for a single round."""
    ideal: float | None = None
    """The gain that the arithmetic allows."""

    @property
    def share(self) -> float | None:
        """The gain by the ideal gain: 1 where all of it was reached, and below where the variant carries something
        that the arithmetic does not ask for.
        """
        return None if self.ideal is None else self.gain / self.ideal


def interval(gains: Sequence[float], seed: int) -> tuple[float, float] | None:
    """The 95% interval of the median of rounds, each a pair of fresh processes: what varies most is the process."""
    from scipy.stats import bootstrap

    if len(gains) < 2 or len(set(gains)) == 1:
        return None
    settings: dict[str, Any] = {"n_resamples": RESAMPLES, "method": "percentile", "rng": seed}
    found = bootstrap((np.array(gains),), np.median, **settings).confidence_interval
    return float(found.low), float(found.high)


def rows(
    measured: Mapping[str, Sequence[Round]],
    shape: Shape,
    plan: AttentionPlan,
    heads: tuple[HeadPlan, HeadPlan],
    machine: Machine,
    settings: BenchSettings,
) -> list[Row]:
    """Every figure, `measured` being of `stock` and `variant`, and `heads` theirs.

    What was interleaved is compared by its pairs: a round's gain is the median of those of steps next to each other.
    """
    stock, variant = measured["stock"], measured["variant"]
    full = AttentionPlan.of(len(plan.layers))
    found: list[Row] = []

    def row(
        name: str,
        unit: str,
        values: tuple[list[float], list[float]],
        ideal: float | None,
        gains: Sequence[float] = (),
    ) -> None:
        theirs, ours = values
        gains = gains or [a / b for a, b in zip(theirs, ours, strict=True)]
        spread = interval(gains, settings.seed)
        medians = statistics.median(theirs), statistics.median(ours)
        found.append(Row(name, unit, *medians, statistics.median(gains), spread, ideal))

    def each_of(value: Callable[[Round], float], some: slice = slice(None)) -> tuple[list[float], list[float]]:
        return [value(each) for each in stock[some]], [value(each) for each in variant[some]]

    for text in settings.work:
        steps = Work.parse(text).steps
        theirs, ours = (parts(shape, *each, steps) for each in ((full, heads[0]), (plan, heads[1])))
        times = each_of(partial(_milliseconds, text))
        pairs = [_paired(text, *each) for each in zip(stock, variant, strict=True)] if settings.interleaved else ()
        row(text, "ms", times, machine.seconds(theirs) / machine.seconds(ours), pairs)
    # vLLM compiles at a model's first start, and finds what it compiled at later ones.
    later = slice(1 if len(stock) > 1 else 0, None)
    row("start-up", "s", each_of(lambda each: each.start_seconds, later), 1.0)
    row("peak memory", "GiB", each_of(lambda each: each.peak_bytes / 2**30), None)
    context = variant[0].max_model_len
    capacity = shape.kv_tokens(full, context) / shape.kv_tokens(plan, context)
    tokens = each_of(lambda each: float(each.kv_capacity_tokens))
    row("KV-cache capacity", "tokens", tokens, capacity, [b / a for a, b in zip(*tokens, strict=True)])
    return found


def _milliseconds(text: str, measured: Round) -> float:
    return 1e3 * statistics.median(measured.seconds[text])


def _paired(text: str, stock: Round, variant: Round) -> float:
    return statistics.median(a / b for a, b in zip(stock.seconds[text], variant.seconds[text], strict=True))


def report(
    model: str,
    variant: str,
    found: Sequence[Row],
    measured: Mapping[str, Sequence[Round]],
    machine: Machine,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "model": model,
        "variant": variant,
        **settings,
        "machine": {
            "cpu": platform.machine(),
            "threads": measured["stock"][0].threads,
            "flops_per_second": machine.flops,
            "bytes_per_second": machine.bandwidth,
        },
        "vllm": " ".join(vllm_distribution() or ("none",)),
        "rows": [asdict(row) | {"share": row.share} for row in found],
        "rounds": {name: [asdict(each) for each in some] for name, some in measured.items()},
    }


def show(made: Mapping[str, Any], found: Sequence[Row]) -> None:
    """Print the table."""
    machine = made["machine"]
    turns = "together, step by step in turn" if made["interleaved"] else "in turn"
    table = Table(
        title=f"{made['model']}, {made['variant']}, beside stock",
        caption=f"{made['vllm']}; {machine['threads']} cores, {machine['flops_per_second'] / 1e9:.0f} Gflop/s, "
        f"{machine['bytes_per_second'] / 1e9:.1f} GB/s; fresh processes {turns}, medians of {made['count']} rounds; "
        "share: the gain by the ideal one",
    )
    for column in ("", "stock", "variant", "gain", "95%", "ideal", "share"):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        digits = 0 if row.stock >= 1000 else 1 if row.stock >= 100 else 2
        spread = "" if row.interval is None else f"{row.interval[0]:.3f}-{row.interval[1]:.3f}"
        ideal = ("", "") if row.share is None else (f"{row.ideal:.3f}×", f"{row.share:.1%}")
        values = (f"{value:,.{digits}f}" for value in (row.stock, row.variant))
        table.add_row(f"{row.name}, {row.unit}", *values, f"{row.gain:.3f}×", spread, *ideal)
    Console(highlight=False).print(table)
