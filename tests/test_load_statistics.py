"""Ratios with intervals: equal things are not told apart, drift or not, and gains are."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loadtests.answer import CUT, GIVEN_UP, Answer, Objective
from loadtests.requirements import Requirement
from loadtests.statistics import Ratio, figures, ratio

OBJECTIVE = Objective(ttft=1.0, itl=0.1)


def rounds(dice, count, gain, drift=0.0, noise=0.05):
    """Pairs of one machine that gets slower by `drift` a turn, A and B in alternating order."""
    a, b = [], []
    for turn in range(count):
        order = (a, b) if turn % 2 == 0 else (b, a)
        for place, side in enumerate(order):
            slower = math.exp(-drift * (2 * turn + place))
            side.append(slower * (gain if side is b else 1) * math.exp(dice.normal(0, noise)))
    return a, b


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("drift", [0.0, 0.05])
def test_a_and_a_are_told_apart_no_more_often_than_chance_allows(count, drift):
    dice = np.random.default_rng(count)
    differs = [ratio(*rounds(dice, count, 1.0, drift)).differs for _ in range(300)]
    assert np.mean(differs) < 0.09  # 5% is meant; 300 tries and a drift that is not quite even add to it


def test_a_gain_is_found():
    dice = np.random.default_rng(0)
    found = [ratio(*rounds(dice, 3, 1.5, 0.03)) for _ in range(100)]
    assert np.mean([each.differs for each in found]) > 0.9
    assert np.mean([each.low < 1.5 < each.high for each in found]) > 0.88
    assert np.median([each.value for each in found]) == pytest.approx(1.5, rel=0.05)


def test_an_interval_is_never_finer_than_the_search():
    assert ratio([10, 10, 10], [10.3, 10.3, 10.3], resolution=0.1).differs is False
    assert ratio([10, 10, 10], [10.3, 10.3, 10.3], resolution=0.01).differs is True


def test_one_round_tells_nothing():
    found = ratio([1.0], [2.0])
    assert (found.value, found.low, found.high, found.differs) == (2.0, 0.0, math.inf, False)


def answered(intended, first, gaps, **more):
    times = tuple(intended + first + each for each in np.cumsum([0, *gaps]))
    more = {"end": times[-1] if times else intended, "prompt_tokens": 3, "answer_tokens": len(times)} | more
    return Answer("chat", "0", intended, intended, times=times, **more)


def cut_at(answer, end):
    times = tuple(time for time in answer.times if time < end)
    return replace(answer, times=times, answer_tokens=len(times), end=min(answer.end, end), error=CUT)


def test_figures_count_from_the_schedule_and_leave_the_warm_up_out():
    answers = [
        answered(0.0, 5.0, [0.01] * 9),  # warm-up
        answered(10.0, 0.5, [0.05] * 9),
        answered(11.0, 2.0, [0.05] * 9),  # a late first token
        answered(12.0, 0.5, [0.05, 0.5] * 5),  # slow gaps
        answered(13.0, 0.5, [0.05] * 9, error="dropped"),
        answered(20.0, 0.5, [0.05] * 9),  # sent to keep the load on
    ]
    found = figures(answers, OBJECTIVE, 10.0, 20.0)
    assert (found.requests, found.good, found.goodput) == (4, 0.25, 0.1)
    assert found.ttft == (0.5, pytest.approx(np.quantile([0.5, 2.0, 0.5], 0.95)))
    assert found.errors == {"dropped": 1}
    assert found.tokens_in == 9
    assert not found.given_up


def test_what_is_cut_off_is_judged_by_what_came():
    """A late first token, and none, are bad; how long whole answers take is not known."""
    cut = {"error": CUT, "end": 20.0}
    answers = [
        answered(10.0, 0.5, [0.05] * 9, **cut),
        answered(11.0, 0.5, [0.5] * 9, **cut),
        Answer("chat", "0", 12.0, 12.0, 20.0, error=CUT),
        answered(13.0, 0.5, [0.05] * 9),
    ]
    found = figures(answers, OBJECTIVE, 10.0, 20.0)
    assert (found.requests, found.good, found.errors) == (4, 0.5, {})
    assert found.tokens_per_second == 3.0
    assert math.isnan(found.latency[0])
    assert not found.given_up


def test_several_tokens_a_chunk_make_gaps_long_and_time_per_token_true():
    burst = answered(0.0, 0.1, [0.4] * 4, answer_tokens=17)
    assert burst.gaps == pytest.approx([0.4] * 4)
    assert burst.tpot == pytest.approx(1.6 / 16)


def test_a_queue_that_grows_is_not_steady():
    steady = [answered(float(time), 0.5, [0.05] * 9) for time in range(60)]
    growing = [answered(float(time), 0.5 + time / 2, [0.05] * 9) for time in range(60)]
    assert figures(steady, OBJECTIVE, 5, 55).steady
    assert not figures(growing, OBJECTIVE, 5, 55).steady
    cut = [*steady, Answer("chat", "x", 30.0, 30.0, 31.0, error=GIVEN_UP)]
    assert figures(cut, OBJECTIVE, 5, 55).given_up


def test_a_run_too_short_for_a_queue_is_steady_only_if_as_much_comes_as_is_asked_for():
    """An answer takes 20 s: fifteen or five are under way, and room is found for ten more in ten seconds."""
    sent = [answered(float(time), 0.1, [0.08] * 249, asked_tokens=250) for time in range(10)]
    seen = [cut_at(answer, 10.0) for answer in sent]
    before = [cut_at(answered(-each - 1.0, 0.1, [0.08] * 249, asked_tokens=250), 10.0) for each in range(15)]
    served = figures([*before, *seen], OBJECTIVE, 0, 10)
    assert (served.good, served.steady) == (1.0, True)
    crowded = figures([*before[:5], *seen], OBJECTIVE, 0, 10)
    assert (crowded.good, crowded.steady) == (1.0, False)
    early = [answered(float(time), 0.1, [0.08] * 9, asked_tokens=250) for time in range(10)]  # it stops by itself
    assert figures(early, OBJECTIVE, 0, 10).steady


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("goodput_ratio>=1.2", {"chat": "", "rag": "goodput_ratio is 1.100 (1.000-1.200), and >=1.2 is required"}),
        ("chat:goodput_ratio>1.2", {"chat": ""}),
        ("rag:ttft_p95_ratio<=1", {"rag": "ttft_p95_ratio is not measured, and <=1 is required"}),
    ],
)
def test_requirements(text, fails):
    rows = {"chat": {"goodput_ratio": Ratio(1.3, 1.2, 1.4, 3)}, "rag": {"goodput_ratio": Ratio(1.1, 1.0, 1.2, 3)}}
    assert Requirement.parse(text, ("chat", "rag")).failures(rows) == fails


@pytest.mark.parametrize("text", ["goodput>=1", "goodput_ratio=1", "goodput_ratio>=x", "other:goodput_ratio>=1"])
def test_refuses_requirements_that_are_none(text):
    with pytest.raises(ValueError, match="require"):
        Requirement.parse(text, ("chat", "rag"))
