"""A and B under the same promise: how many more requests a second does B answer within it, and how fast at equal load?

Both servers stay up where memory allows, and one at a time is under load. Runs go A, B, B, A, each at the rate that
tells most about that side's highest (`loadtests/threshold.py`), until the ratio's interval is narrow enough, or the
time is over, but for one pair. The two runs of a pair have the same arrivals and lengths, so both sides have the same
luck, and texts of their own. Pairs at one common rate, 80% of what the weaker side serves, then tell latencies at equal
load. A pair is begun only where there is time for it, by what the last two took. A run begins with as many requests
under way as Little's law asks for, by the time per token of the last run that held.
"""

import contextlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from typing import Literal

import httpx
import numpy as np

from loadtests.answer import Answer
from loadtests.guidellm import Benchmark
from loadtests.metrics import INTERVAL, Scraper, capacity_of, from_prometheus, prefix_cache
from loadtests.results import Plan, Point, Results
from loadtests.run import LEAST_REQUESTS, Pace, warm_up
from loadtests.settings import Load
from loadtests.statistics import figures, waited
from loadtests.texts import Texts
from loadtests.threshold import LEAST, SIDES, Thresholds
from loadtests.watch import Client, two

LEVEL = 0.8
IN_TURN = 4
"""Runs of a side while its server is up, where each is started for its turn."""
RETRIES = 2
"""How often a run that the client was too slow for is made again."""
Opened = Callable[[], AbstractContextManager[str]]
"""Makes a side's server be there, and gives its URL."""


class Comparison:
    """Measures a plan."""

    def __init__(
        self,
        plan: Plan,
        sides: dict[str, Opened],
        described: dict[str, str],
        imported: dict[str, list[Benchmark]] | None = None,
    ) -> None:
        self.plan, self.sides, self.imported = plan, sides, imported or {}
        self.live = [side for side in SIDES if side not in self.imported]
        if self.imported and (len(plan.workloads) > 1 or plan.in_turn):
            raise ValueError("an imported side: give one --workload, like the one it was made with, and no --in-turn")
        versions = {name: version(name) for name in ("vllm-ext", "locust", "httpx", "scipy", "plotly")}
        versions["python"] = platform.python_version()
        self.results = Results(plan, described, versions)
        self.paces: dict[tuple[str, str], Pace] = {}
        self.thresholds: dict[str, Thresholds] = {}
        self.texts = itertools.count(plan.load.seed)
        self.level_answers: dict[tuple[str, str], list[Answer]] = {}
        self.started = time.monotonic()
        self.step: Callable[[str], None] = lambda text: None

    def measure(self, step: Callable[[str], None], save: Callable[[Results], None]) -> Results:
        """Make all runs; `step` is told of each, and `save` has the results after every pair, and at the end.

        Raises:
            ValueError: where a side cannot be asked, or the client is too slow for it.

        """
        self.step = step
        search = self._in_turn if self.plan.in_turn else self._together
        with contextlib.closing(search()) as pairs:
            for complete in pairs:
                self.results.complete = complete
                self._conclude()
                save(self.results)
        return self.results

    @property
    def gone(self) -> float:
        """The part of the time that is over."""
        return (time.monotonic() - self.started) / 60 / self.plan.minutes

    def _together(self) -> Generator[bool]:
        """Both servers up; says after every pair, and at the end, whether it is complete."""
        with contextlib.ExitStack() as stack:
            urls: dict[str, str] = {}
            for side in self.live:
                self.step(f"{side} starts")
                urls[side] = stack.enter_context(self._observed(side))
            for place, workload in enumerate(self.plan.workloads):
                if place and self.gone >= 1:
                    break
                until = self.gone + (1 - self.gone) / (len(self.plan.workloads) - place)
                levels = self._import(workload)
                pairs = len(levels) * bool(self.live) if self.imported else self.plan.pairs
                self.results.pairs[workload] = pairs
                for side in self.live:
                    self._warm_up(urls[side], side, workload)
                known, took = self.thresholds[workload], list[float]()
                for pair in itertools.count():
                    begun = self.gone
                    for side in self._order(pair):
                        self._run(urls[side], side, workload, known.next_rate(side), pair, "search")
                    yield False
                    took.append(self.gone - begun)
                    kept = min(pairs, 1) if pair + 1 >= LEAST else 0  # fewer would conclude nothing
                    over = self.gone + (1 + kept / LEVEL) * max(took[-2:]) > until  # those of a lower rate take longer
                    if not self.live or over or known.enough(self.plan.width, self.results.confidence, self.live):
                        break
                for pair in range(pairs):
                    begun = self.gone
                    if begun + max(took[-2:]) > until:
                        break
                    for side in self._order(pair):
                        level = levels[pair] if self.imported else self._level(workload)
                        self._run(urls[side], side, workload, level, -1 - pair, "level")
                    yield False
                    took.append(self.gone - begun)
            yield True

    def _order(self, pair: int) -> list[str]:
        """The sides that runs are made of, in the order of that pair."""
        return self.live if pair % 2 == 0 else self.live[::-1]

    def _import(self, workload: str) -> list[float]:
        """Take what was measured elsewhere; returns the rates of the runs that held, to be compared at equal load."""
        if not self.imported:
            return []
        rates = [each.rate for benchmarks in self.imported.values() for each in benchmarks]
        guess = self.plan.start or math.exp(float(np.mean(np.log(rates))))
        known = self.thresholds[workload] = Thresholds(guess, self.plan.load.seed)
        levels: dict[str, list[float]] = {side: [] for side in self.imported}
        for side, benchmarks in self.imported.items():
            for each in benchmarks:
                found = figures(each.answers, self.plan.objective, each.start, each.end, each.rate)
                held = found.held(self.plan.objective)
                known.add(side, each.rate, held)
                late = two([answer.sent - answer.intended for answer in each.answers])
                client = Client((0.0, 0.0), late, 0.0)
                kind: Literal["search", "level"] = "level" if held and len(levels[side]) < self.plan.pairs else "search"
                if kind == "level":
                    levels[side].append(each.rate)
                    self.level_answers.setdefault((workload, side), []).extend(a for a in each.answers if a.sound)
                self.results.points.append(
                    Point(side, workload, kind, found, held, math.nan, math.nan, math.nan, client)
                )
        return levels[next(iter(levels))]

    def _in_turn(self) -> Generator[bool]:
        """One server up, for some runs of its own; sides alternate in who is first. Says what `_together` says."""
        self.results.pairs = dict.fromkeys(self.plan.workloads, 1)
        for turn in itertools.count():
            begun = self.gone
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                self.step(f"{side} starts")
                with self._observed(side) as url:
                    for workload in self.plan.workloads:
                        self._warm_up(url, side, workload)
                        known = self.thresholds[workload]
                        for place in range(IN_TURN):
                            self._run(url, side, workload, known.next_rate(side), IN_TURN * turn + place, "search")
                        if turn:
                            level = self._level(workload, hold=side != SIDES[turn % 2])
                            self._run(url, side, workload, level, -turn, "level")
            enough = all(each.enough(self.plan.width, self.results.confidence) for each in self.thresholds.values())
            following = (self.gone - begun) * (1 if turn else 1 + 1 / IN_TURN)  # the first has no runs at equal load
            done = bool(turn and enough) or self.gone + following > 1
            yield done
            if done:
                return

    @contextlib.contextmanager
    def _observed(self, side: str) -> Iterator[str]:
        """The side's server, scraped throughout."""
        with self.sides[side]() as url:
            self.results.capacity[side] = capacity_of(url)
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

    def _warm_up(self, url: str, side: str, workload: str) -> None:
        """The first answers are late; they tell where to look for the highest rate too."""
        self.step(f"{workload}: {side} warms up")
        load = replace(self.plan.load, workload=workload, seed=next(self.texts))
        served, token_seconds = warm_up(url, load)
        self.paces.setdefault((side, workload), Pace(token_seconds))
        if workload not in self.thresholds:
            guess = self.plan.start or first_guess(
                load, served, token_seconds, self.results.capacity.get(side, math.nan)
            )
            self.thresholds[workload] = Thresholds(guess, self.plan.load.seed)

    def _level(self, workload: str, hold: bool = False) -> float:
        """One rate for both sides of a pair."""
        known = self.thresholds[workload]
        before = [
            each.figures.rate for each in self.results.points if (each.workload, each.kind) == (workload, "level")
        ]
        if before and (hold or not self.plan.in_turn):
            return before[-1]
        return LEVEL * min(known.quantile(side, 0.5) for side in SIDES)

    def _run(
        self, url: str, side: str, workload: str, rate: float, pair: int, kind: Literal["search", "level"]
    ) -> None:
        """One run; all of a pair have the same arrivals and lengths."""
        seed = self.plan.load.seed + 1000 * (pair + 1)
        for _ in range(1 + RETRIES):
            self.step(f"{workload}: {side} at {rate:.3g} requests/s")
            load = replace(self.plan.load, workload=workload, rate=rate, seed=seed, text_seed=next(self.texts))
            before = prefix_cache(url)
            done = self.paces[side, workload].run(url, load, self.plan.objective)
            after = prefix_cache(url)
            if not (why := done.client.void(self.plan.client_bound)):
                break
        else:
            raise ValueError(why)
        if self.plan.prometheus:
            self._from_prometheus(side, url)
        if kind == "level":
            self.level_answers.setdefault((workload, side), []).extend(done.measured)
        end = done.start + done.figures.seconds
        usage = [
            sample["kv_cache_usage"]
            for sample in self.results.samples[side]
            if "kv_cache_usage" in sample and done.start <= sample["time"] < end
        ]
        held = done.figures.held(self.plan.objective)
        self.thresholds[workload].add(side, rate, held)
        looked_up = after[0] - before[0], after[1] - before[1]
        used = float(np.mean(usage)) if usage else math.nan
        self.results.points.append(Point(side, workload, kind, done.figures, held, used, *looked_up, done.client))

    def _conclude(self) -> None:
        results = self.results
        results.seconds = time.monotonic() - self.started
        for workload, known in self.thresholds.items():
            results.served[workload] = {side: known.quantile(side, 0.5) for side in SIDES}
            results.gain[workload] = known.ratio(results.confidence)
        grid = np.linspace(0, 1, 201)
        for (workload, side), answers in self.level_answers.items():
            kinds = {
                "ttft": np.array([waited(answer) for answer in answers]),
                "itl": np.concatenate([np.array([]), *(answer.gaps for answer in answers)]),
            }
            results.distributions.setdefault(workload, {})[side] = {
                kind: np.quantile(values, grid).tolist() if len(values) else [] for kind, values in kinds.items()
            }


def first_guess(load: Load, served: float, token_seconds: float, capacity: float) -> float:
    """Requests a second: what a warm-up was served, or what the KV cache has room for at once, whichever is less.

    The latter counts no less than a run of plain length needs: tokens of a warm-up, which prompts hold up, make it look
    slow, and at too low a rate the first run would take most of the time there is.
    """
    workload = load.asks(texts=Texts())
    held = workload.mean_tokens - workload.mean_answer / 2
    if not (capacity > 0 and token_seconds > 0):
        return served
    room = capacity / held / (workload.mean_answer * token_seconds)
    return min(served, max(room, LEAST_REQUESTS / load.duration))
