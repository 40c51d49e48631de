"""Draws that are spread evenly over numbered things, where chance would need many of them for the same mean."""

import math
import random
from typing import Any

STEPS = tuple(math.sqrt(prime) % 1 for prime in (2, 3, 5, 7, 11, 13, 17, 19))
"""From one number to the next, of each draw: square roots of primes, Richtmyer's sequence (1951)."""


class Even(random.Random):
    """The thing of that number: each of its first draws is spread evenly over numbers in a row; the seed shifts all."""

    def __init__(self, seed: str, number: int) -> None:
        super().__init__(seed)
        self.number, self.steps = number, iter(STEPS)
        self.later = random.Random(f"{seed}/{number}")

    def __new__(cls, _seed: str, _number: int) -> "Even":
        """The base class takes one argument at most."""
        return super().__new__(cls)

    def random(self) -> float:
        """The next draw, at least 0 and below 1."""
        step = next(self.steps, None)
        return self.later.random() if step is None else (super().random() + self.number * step) % 1

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """Of a range, in its order, which the base class does not keep."""
        found = range(start) if stop is None else range(start, stop, step)
        return found[int(self.random() * len(found))]

    def choice(self, seq: Any) -> Any:
        """One of them, by its place."""
        return seq[self.randrange(len(seq))]
