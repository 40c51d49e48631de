"""The highest rate at which an objective holds: bracketed by factors, then bisected."""

import math
from collections.abc import Callable

PROBES = 24
ROUNDING = 1 + 1e-9


def saturate(
    holds: Callable[[float], bool],
    start: float,
    tolerance: float = 0.05,
    factor: float = 2.0,
    probes: int = PROBES,
    held: float = 0.0,
    failed: float = math.inf,
) -> float:
    """The rate that held next below one that did not, no more than `tolerance` above it; rates are bisected as logs.

    `held` and `failed` are rates of which that is known already.

    Raises:
        ValueError: where after `probes` probes nothing held, or nothing failed.

    """
    if not (start > 0 and tolerance > 0 and factor > 1):
        raise ValueError(f"start {start:g}, tolerance {tolerance:g}, factor {factor:g}: must be above 0, 0 and 1")
    rate = start if held < start < failed else _next(held, failed, factor)
    for _ in range(probes):
        if holds(rate):
            held = max(held, rate)
        else:
            failed = min(failed, rate)
        if failed <= held * (1 + tolerance) * ROUNDING:
            return held
        rate = _next(held, failed, factor)
    if held and failed < math.inf:
        return held
    tried = "held up" if held else "failed down"
    raise ValueError(
        f"saturation: the objective {tried} to {rate:g} requests a second; give another start or objective"
    )


def _next(held: float, failed: float, factor: float) -> float:
    """Further than `factor` from what failed only where nothing else is left: what held may lie far below."""
    if failed == math.inf:
        return held * factor
    return max(failed / factor, math.sqrt(held * failed))
