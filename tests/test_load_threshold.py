"""How many times more one server serves than another is told right, in the time promised, in virtual time.

The servers are plain simulations with known times: so many requests at once, first come first served. What they answer
goes the whole way that real answers go, but for HTTP; the time that each run would take is added up.
"""

import heapq
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, takewhile

import numpy as np
import pytest
from junitparser import JUnitXml

from loadtests import compare, verdict
from loadtests.answer import CUT, Answer, Objective
from loadtests.compare import Comparison
from loadtests.report import write
from loadtests.requirements import Requirement
from loadtests.results import Plan
from loadtests.run import LEAST_REQUESTS, Run
from loadtests.settings import Load
from loadtests.statistics import figures
from loadtests.threshold import SIDES, Thresholds
from loadtests.watch import Client

NIGHTLY = pytest.mark.nightly  # minutes of simulation
FIRST, GAP = 0.2, 0.01
OBJECTIVE = Objective(ttft=2.0, itl=0.2, goodput=0.9)
LOAD = Load(scale=0.5, warmup=3, duration=18, cut=True)
OVERHEAD = 4.0
"""Seconds that a run takes beside what it sends: Locust starts, requests under way begin."""
SLOW = {
    "load": Load(scale=2, warmup=5, duration=18, cut=True),
    "objective": Objective(ttft=12, itl=2, goodput=0.9),
    "slow": 7.0,
    "overhead": lambda run: 12.0,
}
"""As `make compare` on a machine without fast products: 70 ms a token, so that five requests are all of a run."""


class Clock:
    """Virtual time, in place of the module `time`; `overhead` tells what the n-th run takes beside what it sends."""

    def __init__(self, overhead) -> None:
        self.now, self.overhead, self.runs = 0.0, overhead, count()

    def monotonic(self) -> float:
        return self.now


class Machine:
    """Serves `slots` requests at once, `slow` times as slowly; its speed drifts, and is another in each run."""

    def __init__(self, slots: int, clock: Clock, noise: float, drift: float, dice, slow: float) -> None:
        self.slots, self.clock, self.noise, self.drift, self.dice, self.slow = slots, clock, noise, drift, dice, slow

    def run(self, url: str, load: Load, objective: Objective) -> Run:
        slower = self.slow * math.exp(self.dice.normal(0, self.noise) + self.drift * self.clock.now / 900)
        duration = max(load.duration, LEAST_REQUESTS / load.rate)
        workload, end, answers = load.asks("m"), load.warmup + duration + objective.ttft, []
        free = [0.0] * self.slots
        under_way = min(self.slots, round(load.rate * workload.mean_answer * GAP * self.slow))
        asked = [(0.0, request.answer_tokens) for request in workload.under_way(under_way)]
        come = takewhile(lambda each: each[0] < end, load.sends(workload))
        asked += [(arrival, conversation.turns[0].answer_tokens) for arrival, conversation in come]
        for number, (arrival, tokens) in enumerate(asked):
            start = max(arrival, heapq.heappop(free)) + FIRST * slower
            heapq.heappush(free, start + tokens * GAP * slower)
            times = tuple(time for time in (start + np.arange(tokens) * GAP * slower).tolist() if time < end)
            done = len(times) == tokens
            error, last = (None, times[-1]) if done else (CUT, end)
            answers.append(
                Answer("chat", str(number), arrival, arrival, last, times, 10, len(times), tokens, error=error)
            )
        self.clock.now += end + self.clock.overhead(next(self.clock.runs))
        found = figures(answers, objective, load.warmup, load.warmup + duration, load.rate)
        return Run(found, answers, load.warmup, Client((0, 0), (0, 0), 0.1))


def compared(
    monkeypatch,
    slots,
    seed,
    noise=0.04,
    drift=0.1,
    minutes=15.0,
    arrival="constant",
    overhead=lambda run: OVERHEAD,
    save=lambda results: None,
    workloads=("chat",),
    load=LOAD,
    objective=OBJECTIVE,
    slow=1.0,
    **more,
):
    """A whole comparison; returns its results and the seconds that it would have taken."""
    clock, dice = Clock(overhead), np.random.default_rng(seed)
    machines = dict(zip(SIDES, (Machine(each, clock, noise, drift, dice, slow) for each in slots), strict=True))

    def warm_up(url, load):
        clock.now += load.warmup + load.duration + OVERHEAD
        busy = load.asks("m").mean_answer * GAP * slow
        return float(np.exp(dice.normal(0, 0.4))) * machines[url].slots / busy, GAP * slow

    class Pace:
        def __init__(self, _):
            self.token_seconds = GAP

        def run(self, url, load, objective):
            return machines[url].run(url, load, objective)

    monkeypatch.setattr(compare, "time", clock)
    monkeypatch.setattr(compare, "warm_up", warm_up)
    monkeypatch.setattr(compare, "Pace", Pace)
    monkeypatch.setattr(compare, "capacity_of", lambda url: math.nan)
    monkeypatch.setattr(compare, "prefix_cache", lambda url: (math.nan, math.nan))
    monkeypatch.setattr(Comparison, "_observed", lambda self, side: nullcontext(side))
    plan = Plan(workloads, objective, replace(load, seed=seed, arrival=arrival), minutes=minutes, **more)
    results = Comparison(plan, {}, dict.fromkeys(SIDES, "")).measure(lambda _: None, save)
    return results, clock.now


@pytest.mark.parametrize(
    ("arrival", "tries"),
    [("constant", 20), pytest.param("constant", 200, marks=NIGHTLY), pytest.param("poisson", 100, marks=NIGHTLY)],
)
def test_equal_servers_are_no_difference_in_nineteen_of_twenty(monkeypatch, arrival, tries):
    found = [compared(monkeypatch, (10, 10), seed, arrival=arrival) for seed in range(tries)]
    same = ["no difference" in verdict.verdict(results, "chat") for results, _ in found]
    assert np.mean(same) >= 0.95
    assert max(seconds for _, seconds in found) <= 15 * 60


@pytest.mark.parametrize("tries", [20, pytest.param(40, marks=NIGHTLY)])
@pytest.mark.parametrize(("slots", "gain"), [((10, 12), 1.2), ((10, 13), 1.3), ((10, 15), 1.5)])
def test_planted_ratios_are_told_right_in_a_quarter_of_an_hour(monkeypatch, slots, gain, tries):
    found = [compared(monkeypatch, slots, seed) for seed in range(tries)]
    intervals = [results.gain["chat"] for results, _ in found]
    assert np.mean([each.low <= gain <= each.high for each in intervals]) >= 0.85  # of twenty, three may be outside
    assert np.median([each.value for each in intervals]) == pytest.approx(gain, rel=0.05)
    if gain >= 1.3:
        assert np.mean(["B serves more" in verdict.verdict(results, "chat") for results, _ in found]) >= 0.85
    else:  # a difference that is sure ends the search before
        assert np.median([each.high / each.low for each in intervals]) <= 1.35
    assert max(seconds for _, seconds in found) <= 15 * 60


@pytest.mark.parametrize("tries", [20, pytest.param(100, marks=NIGHTLY)])
def test_a_slow_machine_tells_servers_apart_too_and_equal_ones_not(monkeypatch, tries):
    equal = [compared(monkeypatch, (5, 5), seed, **SLOW) for seed in range(tries)]
    more = [compared(monkeypatch, (10, 13), seed, **SLOW) for seed in range(tries)]
    assert np.mean(["no difference" in verdict.verdict(results, "chat") for results, _ in equal]) >= 0.95
    assert np.mean(["B serves more" in verdict.verdict(results, "chat") for results, _ in more]) >= 0.8
    assert np.median([each.high / each.low for each in (results.gain["chat"] for results, _ in equal)]) <= 1.55
    assert max(seconds for _, seconds in equal + more) <= 15.5 * 60


def kept_at(slots):
    """Requests a second at which half of the draws of a run hold the promise, on a slow machine without noise."""
    machine = Machine(slots, Clock(lambda _: 0.0), 0.0, 0.0, np.random.default_rng(0), SLOW["slow"])

    def held(rate, seed):
        load = replace(SLOW["load"], rate=rate, seed=seed, arrival="constant")
        return machine.run("", load, SLOW["objective"]).figures.held(SLOW["objective"])

    low, high = 0.05, 2.0
    for _ in range(9):
        middle = math.sqrt(low * high)
        half = np.mean([held(middle, seed) for seed in range(20)]) >= 0.5
        low, high = (middle, high) if half else (low, middle)
    return low


def test_a_slow_machines_ratio_is_that_of_rates_and_not_of_slots(monkeypatch):
    """In a run of few requests more slots keep more promises than in proportion."""
    gains = [kept_at(more) / kept_at(few) for few, more in ((5, 6), (10, 13), (5, 8))]
    assert gains == pytest.approx([1.31, 1.31, 1.73], rel=0.03)
    gain = gains[-1]
    intervals = [compared(monkeypatch, (5, 8), seed, **SLOW)[0].gain["chat"] for seed in range(12)]
    assert np.mean([each.low <= gain <= each.high for each in intervals]) >= 0.85
    assert np.median([each.value for each in intervals]) == pytest.approx(gain, rel=0.08)


def test_a_time_that_is_over_ends_the_search_and_says_how_little_is_known(monkeypatch):
    results, seconds = compared(monkeypatch, (10, 13), 0, minutes=6)
    assert seconds <= 6 * 60
    assert results.gain["chat"].high / results.gain["chat"].low > 1.3


@pytest.mark.parametrize(
    ("overhead", "minutes", "search", "level"),
    [
        (lambda run: 120 if run < 2 else OVERHEAD, 8, 1, 0),  # as a slow pair is all that is known
        (lambda run: 120 if run < 2 else OVERHEAD, 15, 10, 1),  # which serves more comes before latencies
        (lambda run: 60, 6, 1, 0),
        (lambda run: 60, 15, 4, 1),
    ],
)
def test_slow_runs_are_fewer_and_the_time_holds(monkeypatch, overhead, minutes, search, level):
    results, seconds = compared(monkeypatch, (10, 10), 0, minutes=minutes, overhead=overhead)
    assert seconds <= minutes * 60
    assert [len(results.runs("chat", "A", kind)) for kind in ("search", "level")] == [search, level]
    fewer = f"chat: {level} of 3 pairs of runs at equal load, as the time was over."
    assert verdict.missing(results) == [fewer] * (level < 3)


def test_a_workload_that_no_time_is_left_for_is_said_and_meets_no_requirement(monkeypatch, tmp_path):
    results, _ = compared(monkeypatch, (10, 10), 0, minutes=1, workloads=("chat", "rag"))
    required = Requirement.parse("goodput_ratio>=0.01", ("chat", "rag"))
    assert write(results, tmp_path, [required], "")[0].startswith("rag: goodput_ratio is not measured")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"]
    assert report["missing"][1] == "rag: not measured, as the time was over."
    assert report["missing"][1] in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("in_turn", [False, True])
def test_results_are_saved_after_every_pair_and_complete_at_the_end(monkeypatch, in_turn):
    saved = []

    def save(results):
        saved.append(([len(results.runs("chat", side)) for side in SIDES], results.complete))

    results, _ = compared(monkeypatch, (10, 13), 0, minutes=12, save=save, in_turn=in_turn)
    pairs = [4, 9] if in_turn else [*range(1, len(results.points) // 2 + 1), len(results.points) // 2]
    assert saved == [([pair, pair], False) for pair in pairs[:-1]] + [([pairs[-1]] * 2, True)]


def test_what_is_ended_amidst_a_pair_leaves_those_before(monkeypatch, tmp_path):
    def overhead(run):
        if run == 7:
            raise KeyboardInterrupt
        return OVERHEAD

    with pytest.raises(KeyboardInterrupt):
        compared(monkeypatch, (10, 13), 0, overhead=overhead, save=lambda results: write(results, tmp_path, [], ""))
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["runs"]) == 6
    assert not report["complete"]
    assert report["missing"][0].startswith("Incomplete: ")
    assert report["missing"][0] in (tmp_path / "report.html").read_text()
    (suite,) = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
    assert [case.name for case in suite if case.result] == ["ended by itself"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["junit.xml", "report.html", "report.json"]


def test_servers_that_are_up_in_turn_are_told_apart_too(monkeypatch):
    """Some runs of one, then some of the other; both sides of a pair at one rate."""
    results, seconds = compared(monkeypatch, (10, 16), 1, in_turn=True)
    assert results.gain["chat"].low > 1
    rates = {side: [point.figures.rate for point in results.runs("chat", side, "level")] for side in SIDES}
    assert rates["A"] == rates["B"] != []
    assert seconds < 20 * 60


def searched(gain, seed, noise, pairs):
    """The posterior by itself, of servers that serve up to a knee."""
    dice, known = (
        np.random.default_rng(seed),
        Thresholds(float(np.exp(np.random.default_rng(seed).uniform(-1, 1))), seed),
    )
    for pair in range(pairs):
        for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
            rate = known.next_rate(side)
            known.add(side, rate, rate <= (gain if side == "B" else 1) * math.exp(dice.normal(0, noise)))
    return known


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_intervals_have_the_ratio_in_them_and_narrow_with_runs(noise):
    few, many = ([searched(1.4, seed, noise, pairs).ratio() for seed in range(12)] for pairs in (4, 12))
    assert np.mean([each.low <= 1.4 <= each.high for each in few + many]) >= 0.9
    widths = [np.median([each.high / each.low for each in found]) for found in (few, many)]
    assert widths[1] < widths[0]
    assert widths[1] < 1.35


def test_nothing_is_concluded_from_few_runs():
    known = searched(3.0, 0, 0.0, 3)
    assert not known.enough(1e9)
    assert known.ratio().low < known.ratio().value < known.ratio().high


def test_neither_side_is_thought_to_serve_more_beforehand():
    """Nor where all that is known of both is the same."""
    known = Thresholds(1.0)
    assert known.ratio().value == pytest.approx(1, abs=0.01)
    for side in SIDES:
        known.add(side, 2.0, True)
    assert known.ratio().value == pytest.approx(1, abs=0.02)


def test_a_guess_that_is_none_is_refused():
    with pytest.raises(ValueError, match="start 0"):
        Thresholds(0)
