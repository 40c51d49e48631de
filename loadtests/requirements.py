"""Thresholds that fail a build: `goodput_ratio>=1.2`, or for one profile `chat:ttft_p95_ratio<=1`."""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loadtests.statistics import Ratio

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
FORM = re.compile(r"(?:(\w+):)?(\w+)\s*(>=|<=|>|<)\s*([0-9.]+)")
NAMES = (
    "goodput_ratio",
    "kv_capacity_ratio",
    "kv_cache_usage_ratio",
    *(f"{name}_{quantile}_ratio" for name in ("ttft", "itl", "tpot", "latency") for quantile in ("p50", "p95")),
)


@dataclass(frozen=True)
class Requirement:
    """One threshold, judged by the ratio itself; its interval is reported beside."""

    text: str
    profile: str | None
    name: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str, profiles: tuple[str, ...]) -> "Requirement":
        """Read one.

        Raises:
            ValueError: for what is none.

        """
        match = FORM.fullmatch(text.strip())
        if match is None or match[2] not in NAMES or (match[1] and match[1] not in profiles):
            known = ", ".join(NAMES)
            raise ValueError(f"require {text!r}: write NAME>=NUMBER or WORKLOAD:NAME>=NUMBER, NAME one of {known}")
        return cls(text, match[1], match[2], match[3], float(match[4]))

    def failures(self, rows: Mapping[str, Mapping[str, Ratio]]) -> dict[str, str]:
        """By profile that it is about: why it is not met, or nothing where it is."""
        found = {}
        for profile, ratios in rows.items():
            if self.profile not in (None, profile):
                continue
            each = ratios.get(self.name)
            met = each is not None and OPERATORS[self.comparison](each.value, self.bound)
            value = "not measured" if each is None else f"{each.value:.3f} ({each.low:.3f}-{each.high:.3f})"
            found[profile] = "" if met else f"{self.name} is {value}, and {self.comparison}{self.bound:g} is required"
        return found
