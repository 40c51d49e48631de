"""What a comparison says: ratios with intervals, how many needles each side found, and the sentence of it."""

import math
from dataclasses import dataclass

import numpy as np

from loadtests.results import Results
from loadtests.statistics import Ratio, ratio
from loadtests.threshold import SIDES

Z = 1.96


@dataclass(frozen=True)
class Needles:
    """Questions with a known answer: how many each side was asked, and answered right."""

    right: dict[str, int]
    asked: dict[str, int]

    def share(self, side: str) -> float:
        """The part answered right; NaN where none was asked."""
        return self.right[side] / self.asked[side] if self.asked[side] else math.nan

    def interval(self, side: str) -> tuple[float, float]:
        """Wilson's, at 95%."""
        n, p = self.asked[side], self.share(side)
        middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)

    @property
    def difference(self) -> tuple[float, float, float]:
        """B's part less A's, with Newcombe's interval at 95%."""
        (a, b), (low_a, high_a), (low_b, high_b) = map(self.share, SIDES), *map(self.interval, SIDES)
        low = b - a - math.hypot(b - low_b, high_a - a)
        return b - a, low, b - a + math.hypot(high_b - b, a - low_a)


def needles_of(results: Results, workload: str) -> Needles | None:
    """Over all runs, those ended early too; None where none was asked."""
    found = {side: [each.figures.needles for each in results.runs(workload, side)] for side in SIDES}
    right, asked = ({side: sum(each[place] for each in found[side]) for side in SIDES} for place in (0, 1))
    return Needles(right, asked) if all(asked.values()) else None


def hit_rates(results: Results, workload: str) -> dict[str, float]:
    """The part of looked-up tokens that each side's prefix cache had, over all runs; NaN where it does not say."""
    found = {}
    for side in SIDES:
        runs = results.runs(workload, side)
        queries = sum(each.prefix_queries for each in runs)
        found[side] = sum(each.prefix_hits for each in runs) / queries if queries else math.nan
    return found


def ratios(results: Results, workload: str) -> dict[str, Ratio]:
    """B's figures over A's, by name."""
    gain, seed = results.gain[workload], results.plan.load.seed
    runs = min(len(results.runs(workload, side)) for side in SIDES)
    rows = {"goodput_ratio": Ratio(gain.value, gain.low, gain.high, runs)}
    levels = {side: results.runs(workload, side, "level") for side in SIDES}
    for name in ("ttft", "itl", "tpot", "latency"):
        for place, quantile in enumerate(("p50", "p95")):
            pair = [[getattr(point.figures, name)[place] for point in levels[side]] for side in SIDES]
            each = ratio(pair[0], pair[1], seed=seed)
            if each.rounds:
                rows[f"{name}_{quantile}_ratio"] = each
    if all(levels.values()) and all(point.kv_cache_usage > 0 for side in SIDES for point in levels[side]):
        pair = [[point.kv_cache_usage for point in levels[side]] for side in SIDES]
        rows["kv_cache_usage_ratio"] = ratio(pair[0], pair[1], seed=seed)
    if all(results.capacity.get(side, 0) > 0 for side in SIDES):
        capacity = results.capacity["B"] / results.capacity["A"]
        rows["kv_capacity_ratio"] = Ratio(capacity, capacity, capacity, 1)
    return rows


def verdict(results: Results, workload: str) -> str:
    """One sentence: more, less, or no difference."""
    objective, gain = results.plan.objective, results.gain[workload]
    promise = f"TTFT {objective.ttft:g} s and ITL {objective.itl * 1000:g} ms"
    served = results.served[workload]
    rates = f"{served['B']:.3g} against {served['A']:.3g} requests/s"
    interval = f"{gain.value:.2f}× ({gain.low:.2f}-{gain.high:.2f}, {results.confidence:.1%})".replace(".0%", "%")
    if gain.low > 1:
        return f"{workload}: B serves more: {interval} what A does within {promise} ({rates})."
    if gain.high < 1:
        return f"{workload}: B serves less: {interval} what A does within {promise} ({rates})."
    return f"{workload}: no difference: B serves {interval} what A does within {promise} ({rates})."


def quality(results: Results, workload: str) -> str:
    """The sentence beside it: what it costs in answers."""
    found = needles_of(results, workload)
    if found is None:
        asked = results.plan.load.needles
        few = f"Too few answers came to needles on both sides: take more than --needles {asked:g}."
        return few if asked else "Quality was not asked for: --needles 0.1 asks."
    value, low, high = found.difference
    parts = ", ".join(f"{side} finds {found.share(side):.2f} of {found.asked[side]} needles" for side in SIDES)
    word = "B forgets" if high < 0 else "B finds more" if low > 0 else "no difference can be seen"
    return f"{parts}: {word} ({value:+.2f}, {low:+.2f} to {high:+.2f})."


def missing(results: Results) -> list[str]:
    """What was meant to be measured and was not, and why."""
    why = ", as the time was over" if results.complete else ""
    found = [] if results.complete else ["Incomplete: saved on the way, of a comparison that has not ended by itself."]
    for workload in results.plan.workloads:
        made = min(len(results.runs(workload, side, "level")) for side in SIDES)
        wanted = results.pairs.get(workload, 0)
        if workload not in results.gain:
            found.append(f"{workload}: not measured{why}.")
        elif made < wanted:
            found.append(f"{workload}: {made} of {wanted} pairs of runs at equal load{why}.")
    return found


def level_figures(results: Results, workload: str) -> dict[str, dict[str, float]]:
    """Both sides' figures behind the ratios: rates, and medians over the runs at equal load, in seconds."""
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        points = results.runs(workload, side, "level")
        row = {"goodput_ratio": results.served[workload][side]}
        for name in ("ttft", "itl", "tpot", "latency"):
            for place, quantile in enumerate(("p50", "p95")):
                values = [getattr(point.figures, name)[place] for point in points]
                row[f"{name}_{quantile}_ratio"] = float(np.median(values)) if values else math.nan
        row["kv_cache_usage_ratio"] = float(np.mean([point.kv_cache_usage for point in points])) if points else math.nan
        row["kv_capacity_ratio"] = results.capacity.get(side, math.nan)
        found[side] = row
    return found
