"""The highest rate at which an objective holds: bracketed by factors, then bisected."""

import math
from collections.abc import Callable

PROBES = 24


def saturate(
    holds: Callable[[float], bool], start: float, tolerance: float = 0.05, factor: float = 2.0, probes: int = PROBES
) -> float:
    """The rate that held next below one that did not, no more than `tolerance` above it; rates are bisected as logs.

    Raises:
        ValueError: where after `probes` probes nothing held, or nothing failed.

    """
    if not (start > 0 and tolerance > 0 and factor > 1):
        raise ValueError(f"start {start:g}, tolerance {tolerance:g}, factor {factor:g}: must be above 0, 0 and 1")
    held, failed, rate = 0.0, math.inf, start
    for _ in range(probes):
        if holds(rate):
            held = max(held, rate)
        else:
            failed = min(failed, rate)
        if failed <= held * (1 + tolerance):
            return held
        if failed == math.inf:
            rate = held * factor
        elif held == 0:
            rate = failed / factor
        else:
            rate = math.sqrt(held * failed)
    if held and failed < math.inf:
        return held
    tried = "held up" if held else "failed down"
    raise ValueError(
        f"saturation: the objective {tried} to {rate:g} requests a second; give another start or objective"
    )
