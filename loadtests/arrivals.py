"""When requests are to be sent: seconds from the start, from a seed, whatever the server does meanwhile."""

import random
from collections.abc import Iterator


def schedule(kind: str, rate: float, seed: int = 0, burst: int = 8) -> Iterator[float]:
    """Arrival times without end, `rate` a second on average; bursts of `burst` come at Poisson's times.

    Raises:
        ValueError: for a rate or a burst that is not positive.

    """
    if not rate > 0:
        raise ValueError(f"rate {rate:g}: requests a second must be above 0")
    if burst < 1:
        raise ValueError(f"burst {burst}: a burst has at least one request")
    if kind == "constant":
        return _constant(rate)
    if kind == "poisson":
        return _bursts(rate, 1, seed)
    if kind == "bursts":
        return _bursts(rate, burst, seed)
    raise ValueError(f"arrival {kind!r}: take constant, poisson or bursts")


def _constant(rate: float) -> Iterator[float]:
    place = 0
    while True:
        yield place / rate
        place += 1


def _bursts(rate: float, burst: int, seed: int) -> Iterator[float]:
    dice, time = random.Random(seed), 0.0
    while True:
        time += dice.expovariate(rate / burst)
        for _ in range(burst):
            yield time
