"""The highest rates that two servers keep a promise at, and their ratio, by as few runs as it takes.

A run at a rate holds the promise or does not, the more often the lower the rate is: a logistic function of its
logarithm, as in a psychometric function, whose place is each side's threshold and whose width is both sides' noise.
What all runs say together is kept as a posterior on a grid: A's threshold, the ratio of B's to it, and the noise. The
next run is placed where it tells most, near what is believed of that side's threshold (Watson and Pelli's QUEST, 1983).
So every run counts, those of one side tell the other where to look, and it ends once the interval of the ratio is as
narrow as was asked for.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDES = ("A", "B")
REACH, STEP = 2.4, 0.05
"""How far from the first guess thresholds may lie, and how finely they are told, in logarithms."""
FURTHEST, FINE = 1.5, 0.03
"""The same of the ratio."""
NOISE = {0.01: 0.2, 0.03: 0.35, 0.06: 0.3, 0.12: 0.15}
"""Widths of the logistic function that are thought possible, and how likely each is beforehand."""
GUESSED = 0.8
"""Standard deviation of the first guess's logarithm."""
LAPSE = 0.01
"""How often a run fails, or holds, whatever its rate: the machine's other work."""
PRIOR = 0.7
"""Standard deviation of the ratio's logarithm, beforehand: a factor of two either way is nothing special."""
LEAST = 4
"""Runs of each side before anything is concluded."""
SURE = 0.995
"""How sure a difference must be to end before the interval is narrow; that far out, looking often does no harm."""


@dataclass
class Interval:
    """Of the ratio B over A."""

    value: float
    low: float
    high: float


class Thresholds:
    """What is known of both sides' thresholds after each run."""

    def __init__(self, guess: float, seed: int = 0) -> None:
        if not guess > 0:
            raise ValueError(f"start {guess:g}: requests a second must be above 0")
        self.places = math.log(guess) + np.arange(-REACH, REACH + STEP, STEP)
        self.ratios = np.arange(-FURTHEST, FURTHEST + FINE, FINE)
        self.noise = np.array(list(NOISE))
        a = self.places[:, None, None]
        self.of = {"A": a, "B": a + self.ratios[None, :, None]}
        middle = a + self.ratios[None, :, None] / 2  # of both, so that neither side is thought to serve more
        likely = (self.ratios[None, :, None] / PRIOR) ** 2 + ((middle - math.log(guess)) / GUESSED) ** 2
        self.belief = np.log(list(NOISE.values())) - likely / 2
        values = {"A": self.places, "B": (self.places[:, None] + self.ratios).ravel()}
        self.ordered = {side: (order := np.argsort(each), each[order]) for side, each in values.items()}
        self.runs = dict.fromkeys(SIDES, 0)
        self.held = dict.fromkeys(SIDES, 0)
        self.dice = random.Random(seed)

    def add(self, side: str, rate: float, held: bool) -> None:
        """Note a run."""
        hold = 1 / (1 + np.exp(np.clip((math.log(rate) - self.of[side]) / self.noise, -50, 50)))
        hold = LAPSE / 2 + (1 - LAPSE) * hold
        self.belief += np.log(hold if held else 1 - hold)
        self.runs[side] += 1
        self.held[side] += held

    def next_rate(self, side: str) -> float:
        """Where that side's next run tells most; not always quite the same, since all servers have steps."""
        return self.quantile(side, self.dice.uniform(0.35, 0.65))

    def quantile(self, side: str, part: float) -> float:
        """Of what is believed of that side's threshold, in requests a second."""
        weights = self._weights().sum(axis=2)
        order, values = self.ordered[side]
        total = np.cumsum((weights.sum(axis=1) if side == "A" else weights.ravel())[order])
        return math.exp(float(np.interp(part, total, values)))

    def ratio(self, confidence: float = 0.95) -> Interval:
        """B's threshold over A's: the median, and the interval that it is in with that confidence."""
        total = np.cumsum(self._weights().sum(axis=(0, 2)))
        parts = (0.5, (1 - confidence) / 2, (1 + confidence) / 2)
        edges = self.ratios + FINE / 2
        value, low, high = (math.exp(float(np.interp(part, total, edges))) for part in parts)
        return Interval(value, low, high)

    def enough(self, width: float, confidence: float = 0.95, live: Sequence[str] = SIDES) -> bool:
        """Whether the interval's ends are no more than `width` apart, as a ratio, or a difference is sure anyway.

        Sides that are not `live` have no more runs to make.
        """
        if min(self.runs[side] for side in live) < LEAST:
            return False
        found, sure = self.ratio(confidence), self.ratio(1 - (1 - SURE) * (1 - confidence) / 0.05)
        return found.high <= width * found.low or sure.low > 1 or sure.high < 1

    def _weights(self) -> np.ndarray:
        weights = np.exp(self.belief - self.belief.max())
        return weights / weights.sum()
