"""Figures from answers, and ratios with intervals that drift does not fool.

TTFT counts from when a request was meant to be sent; ITL is the gap between two chunks with tokens, several of which a
chunk may hold; TPOT is the time after the first chunk over the server's count of tokens after the first; goodput is the
rate of requests answered within the objective.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtests.answer import CUT, GIVEN_UP, Answer, Objective

CONFIDENCE = 0.95
RESAMPLES = 4_000
GROWTH = 1.25
"""A run is steady if in its second half no more than this many times as many requests are in flight as in its first."""
SERVED = 0.75
"""And if at least this part of the tokens that its requests ask for comes while they are sent. Nothing else tells, in a
run too short for a queue to grow, that more is asked for than served; and a run of few requests has some luck."""


@dataclass(frozen=True)
class Figures:
    """One run's measured requests; times in seconds, NaN where nothing came."""

    rate: float
    """Requests a second that were sent."""
    seconds: float
    requests: int
    good: float
    """The part answered within the objective."""
    goodput: float
    """Requests a second answered within the objective."""
    tokens_in: int
    tokens_out: int
    tokens_per_second: float
    """Output tokens that arrived during the measured seconds, by chunks' share of the server's count."""
    ttft: tuple[float, float]
    """The median and the 95th percentile; of the three below too."""
    itl: tuple[float, float]
    tpot: tuple[float, float]
    latency: tuple[float, float]
    """Of whole answers; NaN where a run ended without waiting for them."""
    errors: dict[str, int]
    given_up: bool
    """Whether it was ended early, over-saturated."""
    needles: tuple[int, int]
    """Answered right, and asked, over the whole run."""
    steady: bool
    """Whether as much is served as is asked for; not so where it was ended early."""

    def held(self, objective: Objective) -> bool:
        """Whether the rate was served within the objective."""
        return self.steady and self.good >= objective.goodput


def figures(answers: Sequence[Answer], objective: Objective, start: float, end: float, rate: float = 0) -> Figures:
    """Of those that were meant to be sent in `start` to `end`, Unix seconds; all others are warm-up and cool-down."""
    measured = [answer for answer in answers if start <= answer.intended < end]
    sound = [answer for answer in measured if answer.sound]
    whole = [answer for answer in sound if answer.error is None]
    good = sum(answer.good(objective) for answer in measured)
    errors = Counter(answer.error for answer in measured if answer.error is not None)
    cut = errors.pop(CUT, 0)
    given_up = GIVEN_UP in errors
    if given_up and measured:
        end = max(answer.intended for answer in measured) + 1e-3
    seconds = end - start
    arrived = 0.0
    for answer in answers:
        times = np.array(answer.times)
        arrived += float(answer.tokens[(start <= times) & (times < end)].sum())
    return Figures(
        rate=rate or len(measured) / seconds,
        seconds=seconds,
        requests=len(measured),
        good=good / len(measured) if measured else 0.0,
        goodput=good / seconds,
        tokens_in=sum(answer.prompt_tokens for answer in whole),
        tokens_out=sum(answer.answer_tokens for answer in whole),
        tokens_per_second=arrived / seconds,
        ttft=_quantiles([waited(answer) for answer in sound]),
        itl=_quantiles(np.concatenate([answer.gaps for answer in sound]) if sound else []),
        tpot=_quantiles([answer.tpot for answer in sound if answer.tpot is not None]),
        latency=_quantiles([] if cut else [answer.latency for answer in whole]),
        errors=dict(errors),
        given_up=given_up,
        needles=(sum(answer.right is True for answer in answers), sum(answer.right is not None for answer in answers)),
        steady=not given_up and is_steady(answers, start, end) and arrived >= SERVED * sum(map(demanded, measured)),
    )


def waited(answer: Answer) -> float:
    """Seconds to its first token, or for as long as it was waited for."""
    return answer.ttft if answer.times else answer.latency


def _quantiles(values: Any) -> tuple[float, float]:
    if len(values) == 0:
        return (math.nan, math.nan)
    low, high = np.quantile(values, (0.5, 0.95))
    return float(low), float(high)


def is_steady(answers: Sequence[Answer], start: float, end: float) -> bool:
    """Whether requests in flight have stopped growing, beyond what chance does: the load is served."""
    middle = (start + end) / 2
    first, second = in_flight(answers, start, middle), in_flight(answers, middle, end)
    return second <= GROWTH * first + 2 * math.sqrt(max(first, 1))


def demanded(answer: Answer) -> int:
    """Tokens that it takes to answer it: those of a whole answer, which may be shorter than asked for."""
    return answer.answer_tokens if answer.error is None else answer.asked_tokens


def in_flight(answers: Sequence[Answer], start: float, end: float) -> float:
    """Requests in flight on average during those seconds."""
    busy = sum(max(0.0, min(answer.end, end) - max(answer.intended, start)) for answer in answers)
    return busy / (end - start)


@dataclass(frozen=True)
class Ratio:
    """B's figure over A's."""

    value: float
    low: float
    high: float
    """95% interval; from 0 to infinity where one round says nothing about chance."""
    rounds: int

    @property
    def differs(self) -> bool:
        """Whether 1 lies outside the interval."""
        return self.low > 1 or self.high < 1


def ratio(
    a: Sequence[float], b: Sequence[float], resolution: float = 0.0, confidence: float = CONFIDENCE, seed: int = 0
) -> Ratio:
    """Of figures taken in pairs, one pair a round: the geometric mean of the rounds' ratios, with its interval.

    A round's two figures are taken next to each other and in alternating order, so drift is in both and cancels. The
    standard error is bootstrapped over rounds (requests of one round share its luck, so they are not resampled as if
    they were independent), and with so few rounds widened as Student's t asks. `resolution` is how coarsely the figures
    were found, as a part: a figure lies anywhere within it, so rounds that agree by chance give no finer interval.
    """
    from scipy.stats import bootstrap, norm, t

    logs = np.log(np.asarray(b, float)) - np.log(np.asarray(a, float))
    logs = logs[np.isfinite(logs)]
    rounds = len(logs)
    if rounds == 0:
        return Ratio(math.nan, 0.0, math.inf, 0)
    mean = float(logs.mean())
    if rounds == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, 1)
    error = 0.0
    if np.ptp(logs) > 1e-12:
        drawn = bootstrap((logs,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed)
        error = float(drawn.standard_error) * math.sqrt(rounds / (rounds - 1))
    coarse = math.log1p(resolution) * math.sqrt(2 / 12 / rounds)  # two figures a round, each even within its step
    place = (1 + confidence) / 2
    half = max(float(t.ppf(place, rounds - 1)) * error, float(norm.ppf(place)) * coarse)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), rounds)
