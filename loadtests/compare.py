"""A and B under the same promise: how many more requests a second does B answer within it, and how fast at equal load?

In every round both sides are measured at the same rate, 80% of what A first served, and each side's saturation rate is
searched anew, from near where it was before. All runs of a round have the same arrivals and lengths, so that both sides
have the same luck, and texts of their own. Rounds alternate in who goes first, so drift hits both; only one side is
under load at a time. A run begins with as many requests under way as Little's law asks for, by the time per token of
the last run that held, so that long answers need no long warm-up.
"""

import contextlib
import itertools
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import httpx
import numpy as np

from loadtests.answer import Answer, Objective
from loadtests.metrics import INTERVAL, Sample, Scraper, from_prometheus, scrape
from loadtests.options import option
from loadtests.run import Pace, Run, warm_up
from loadtests.saturation import saturate
from loadtests.settings import Load
from loadtests.statistics import CONFIDENCE, Figures, Ratio, ratio, waited
from loadtests.texts import Texts

SIDES = ("A", "B")
LEVEL = 0.8
FIRST_FACTOR = 1.6
"""How fast the first search of a side goes up or down; later ones go by their tolerance."""
Opened = Callable[[], AbstractContextManager[str]]
"""Makes a side's server be there, and gives its URL."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    profiles: tuple[str, ...]
    objective: Objective
    load: Load
    rounds: int = option(3, "How often both are measured; two at least tell chance.")
    tolerance: float = option(0.1, "How closely the highest rate is found, as a part of it.")
    start: float | None = option(None, "The first rate to try, requests a second; by default found.")
    in_turn: bool = option(False, "Start each server for its turn alone, where both do not fit.")
    prometheus: str = option("", "A Prometheus that scrapes both, to take metrics from; by default they are scraped.")

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: at least 1")
        if not 0 < self.tolerance <= 1:
            raise ValueError(f"tolerance {self.tolerance:g}: a part of the rate; give one in (0, 1]")
        if self.load.arrival == "closed":
            raise ValueError(f"arrival {self.load.arrival!r}: take constant, poisson or bursts")
        for each in self.profiles:
            replace(self.load, workload=each).asks(texts=Texts())


@dataclass(frozen=True)
class Point:
    """One run of one side."""

    side: str
    profile: str
    round: int
    kind: Literal["search", "level"]
    figures: Figures
    held: bool
    """Whether the objective did."""
    kv_cache_usage: float
    """Mean over the measured seconds, NaN where the server does not say."""


@dataclass
class Results:
    """All that was measured."""

    plan: Plan
    described: dict[str, str]
    versions: dict[str, str]
    points: list[Point] = field(default_factory=list)
    saturation: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By profile and side: requests a second, a round."""
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {side: [] for side in SIDES})
    capacity: dict[str, float] = field(default_factory=dict)
    """KV cache, in tokens."""
    distributions: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """By profile, side, and ttft or itl: quantiles at equal load, 0 to 1 in steps of 0.005, in seconds."""


class Comparison:
    """Measures a plan."""

    def __init__(self, plan: Plan, sides: dict[str, Opened], described: dict[str, str]) -> None:
        self.plan, self.sides = plan, sides
        versions = {name: version(name) for name in ("vllm-ext", "locust", "httpx", "scipy", "plotly")}
        versions["python"] = platform.python_version()
        self.results = Results(plan, described, versions)
        self.level: dict[str, float] = {}
        self.warm: set[tuple[str, str]] = set()
        self.paces: dict[tuple[str, str], Pace] = {}
        self.texts = itertools.count(plan.load.seed)
        self.dice = random.Random(plan.load.seed)
        self.turns = 0
        """How many sides' rounds are done."""
        self.level_answers: dict[tuple[str, str], list[Answer]] = {}

    def measure(self, step: Callable[[str], None], save: Callable[[Results], None]) -> Results:
        """Go through all rounds; `step` is told of each run, and `save` has the results after each round.

        Raises:
            ValueError: where a side cannot be asked, or no rate holds.

        """
        with contextlib.ExitStack() as stack:
            urls: dict[str, str] = {}
            if not self.plan.in_turn:
                for side in SIDES:
                    step(f"{side} starts")
                    urls[side] = stack.enter_context(self._observed(side))
            for turn in range(self.plan.rounds):
                order = SIDES if turn % 2 == 0 else SIDES[::-1]
                if not self.plan.in_turn:
                    turns = [(side, profile) for profile in self.plan.profiles for side in order]
                    for side, profile in turns:
                        self._turn(urls[side], side, profile, turn, step)
                else:
                    for side in order:
                        step(f"round {turn + 1}/{self.plan.rounds}: {side} starts")
                        self.warm = {each for each in self.warm if each[0] != side}
                        with self._observed(side) as url:
                            for profile in self.plan.profiles:
                                self._turn(url, side, profile, turn, step)
                self.results.plan = replace(self.plan, rounds=turn + 1)
                self._distributions()
                save(self.results)
        return self.results

    @contextlib.contextmanager
    def _observed(self, side: str) -> Iterator[str]:
        """The side's server, scraped throughout."""
        with self.sides[side]() as url:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                self.results.capacity[side] = scrape(url)["kv_capacity_tokens"]
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                found = httpx.get(f"{url}/version", timeout=10, trust_env=False).json()["version"]
                self.results.versions[f"server {side}"] = str(found)
            if self.plan.prometheus:
                self._from_prometheus(side, url)  # so that what it does not scrape is found out now
                yield url
                return
            before = self.results.samples[side]
            with Scraper(url) as scraper:
                self.results.samples[side] = scraper.samples  # the runs read these while they are collected
                yield url
            self.results.samples[side] = before + scraper.samples

    def _from_prometheus(self, side: str, url: str) -> None:
        """Add what Prometheus has of that server since it was last asked."""
        samples = self.results.samples[side]
        now = time.time()
        start = samples[-1]["time"] + INTERVAL if samples else now
        if start <= now:
            samples += from_prometheus(self.plan.prometheus, httpx.URL(url).netloc.decode(), start, now)

    def _turn(self, url: str, side: str, profile: str, turn: int, step: Callable[[str], None]) -> None:
        """One side's round of one profile: its latencies at the common rate, and its saturation rate."""
        name = f"round {turn + 1}/{self.plan.rounds}, {profile}: {side}"
        load = replace(self.plan.load, workload=profile)
        served = 0.0
        if (side, profile) not in self.warm:
            step(f"{name} warms up")
            self.warm.add((side, profile))
            served, token_seconds = warm_up(url, replace(load, seed=next(self.texts)))
            self.paces[side, profile] = Pace(token_seconds)
        held, failed = 0.0, math.inf

        def measured(rate: float, kind: Literal["search", "level"]) -> bool:
            step(f"{name} at {rate:.3g} requests/s")
            seed = self.plan.load.seed + 1000 * (turn + 1)
            asked = replace(load, rate=rate, seed=seed, text_seed=next(self.texts))
            done = self.paces[side, profile].run(url, asked, self.plan.objective)
            if kind == "level":
                self.level_answers.setdefault((profile, side), []).extend(done.measured)
            if self.plan.prometheus:
                self._from_prometheus(side, url)
            return self._point(done, side, profile, turn, kind).held

        def at_level() -> None:
            nonlocal held, failed
            rate = self.level[profile]
            if measured(rate, "level"):
                held = rate
            else:
                failed = rate

        if profile in self.level:
            at_level()
        before = self.results.saturation.get(profile, {})
        start, factor = self.start(before, side, served)
        found = saturate(
            lambda rate: measured(rate, "search"), start, self.plan.tolerance, factor, held=held, failed=failed
        )
        self.results.saturation.setdefault(profile, {}).setdefault(side, []).append(found)
        if profile not in self.level:
            self.level[profile] = LEVEL * found
            at_level()
        self.turns += 1

    def start(self, before: dict[str, list[float]], side: str, served: float) -> tuple[float, float]:
        """The first rate that a search tries, and the factor by which it goes on.

        Where one is known, it is drawn from the step above: searches that all try the same rates would agree beyond
        what they know. A side's first is low, so that it holds and tells the time per token before a rate can fail.
        """
        factor = 1 + self.plan.tolerance
        drawn = factor ** self.dice.random()
        if before.get(side):
            return before[side][-1] * drawn, factor
        if before:
            return next(iter(before.values()))[-1] * drawn, FIRST_FACTOR
        return self.plan.start or served / FIRST_FACTOR, FIRST_FACTOR

    def _point(self, measured: Run, side: str, profile: str, turn: int, kind: Literal["search", "level"]) -> Point:
        figures = measured.figures
        end = measured.start + figures.seconds
        usage = [
            sample["kv_cache_usage"]
            for sample in self.results.samples[side]
            if "kv_cache_usage" in sample and measured.start <= sample["time"] < end
        ]
        held = figures.held(self.plan.objective)
        point = Point(side, profile, turn, kind, figures, held, float(np.mean(usage)) if usage else math.nan)
        self.results.points.append(point)
        return point

    def _distributions(self) -> None:
        grid = np.linspace(0, 1, 201)
        for (profile, side), answers in self.level_answers.items():
            kinds = {
                "ttft": np.array([waited(answer) for answer in answers]),
                "itl": np.concatenate([np.array([]), *(answer.gaps for answer in answers)]),
            }
            self.results.distributions.setdefault(profile, {})[side] = {
                kind: np.quantile(values, grid).tolist() if len(values) else [] for kind, values in kinds.items()
            }


def ratios(results: Results, profile: str) -> dict[str, Ratio]:
    """B's figures over A's, by name."""
    plan = results.plan
    confidence = 1 - (1 - CONFIDENCE) / len(plan.profiles)  # each profile has a verdict, and all are to be right
    found = results.saturation[profile]
    rows = {"goodput_ratio": ratio(found["A"], found["B"], plan.tolerance, confidence, plan.load.seed)}
    levels = {
        side: [
            point
            for turn in range(plan.rounds)
            for point in results.points
            if (point.side, point.profile, point.round, point.kind) == (side, profile, turn, "level")
        ]
        for side in SIDES
    }
    for name in ("ttft", "itl", "tpot", "latency"):
        for place, quantile in enumerate(("p50", "p95")):
            pair = [[getattr(point.figures, name)[place] for point in levels[side]] for side in SIDES]
            each = ratio(pair[0], pair[1], seed=plan.load.seed)
            if each.rounds:
                rows[f"{name}_{quantile}_ratio"] = each
    if all(point.kv_cache_usage > 0 for side in SIDES for point in levels[side]):
        pair = [[point.kv_cache_usage for point in levels[side]] for side in SIDES]
        rows["kv_cache_usage_ratio"] = ratio(pair[0], pair[1], seed=plan.load.seed)
    best = {side: [_best(results, profile, side, turn) for turn in range(plan.rounds)] for side in SIDES}
    rows["tokens_per_second_ratio"] = ratio(best["A"], best["B"], plan.tolerance, seed=plan.load.seed)
    if all(results.capacity.get(side) for side in SIDES):
        capacity = results.capacity["B"] / results.capacity["A"]
        rows["kv_capacity_ratio"] = Ratio(capacity, capacity, capacity, 1)
    return rows


def _best(results: Results, profile: str, side: str, turn: int) -> float:
    """Output tokens a second at the saturation rate."""
    rate = results.saturation[profile][side][turn]
    return next(
        point.figures.tokens_per_second
        for point in results.points
        if (point.side, point.profile, point.round, point.figures.rate) == (side, profile, turn, rate)
    )


def verdict(results: Results, profile: str, rows: dict[str, Ratio]) -> str:
    """One sentence: more, less, or no difference."""
    objective, goodput = results.plan.objective, rows["goodput_ratio"]
    promise = f"TTFT {objective.ttft:g} s and ITL {objective.itl * 1000:g} ms"
    served = [float(np.exp(np.mean(np.log(results.saturation[profile][side])))) for side in SIDES]
    rates = f"{served[1]:.3g} against {served[0]:.3g} requests/s"
    if goodput.rounds < 2:
        return f"{profile}: {rates} within {promise} in one round, which cannot tell a difference from chance."
    interval = f"{goodput.value:.3f}× ({goodput.low:.3f}-{goodput.high:.3f})"
    if not goodput.differs:
        return f"{profile}: no difference: B serves {interval} what A does within {promise} ({rates})."
    word = "more" if goodput.value > 1 else "less"
    return f"{profile}: B serves {word}: {interval} what A does within {promise} ({rates})."


def settings_of(plan: Plan) -> dict[str, Any]:
    """As JSON has them."""
    return asdict(plan)


def errors_of(points: Sequence[Point]) -> dict[str, int]:
    """Errors by kind, but for requests of runs that were ended early."""
    from loadtests.answer import GIVEN_UP

    counts: dict[str, int] = {}
    for point in points:
        for kind, count in point.figures.errors.items():
            if kind != GIVEN_UP:
                counts[kind] = counts.get(kind, 0) + count
    return counts
