"""What a comparison is to measure, and what it measured."""

from dataclasses import dataclass, field, replace
from typing import Literal

from loadtests.answer import GIVEN_UP, Objective
from loadtests.metrics import Sample
from loadtests.options import option
from loadtests.settings import Load
from loadtests.statistics import CONFIDENCE, Figures
from loadtests.texts import Texts
from loadtests.threshold import SIDES, Interval
from loadtests.watch import BOUND, Client


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    workloads: tuple[str, ...]
    objective: Objective
    load: Load
    width: float = option(1.3, "The interval of the ratio is searched until its ends are no further apart than this.")
    pairs: int = option(3, "Pairs of runs at equal load, for latencies, if the search leaves time; two tell chance.")
    minutes: float = option(15.0, "All runs end by then: a wider interval, or fewer pairs at equal load.")
    start: float | None = option(None, "The first guess at the highest rate, requests a second; by default found.")
    in_turn: bool = option(False, "Start each server for its turn alone, where both do not fit.")
    prometheus: str = option("", "A Prometheus that scrapes both, to take metrics from; by default they are scraped.")
    client_bound: float = option(BOUND, "Seconds at the median by which this client's times may be wrong in a run.")

    def __post_init__(self) -> None:
        if not (self.width > 1 and self.minutes > 0 and self.pairs >= 1):
            given = f"width {self.width:g}, minutes {self.minutes:g}, pairs {self.pairs}"
            raise ValueError(f"{given}: give above 1, above 0, and at least 1")
        if self.start is not None and not self.start > 0:
            raise ValueError(f"start {self.start:g}: requests a second; give a rate above 0")
        if self.load.arrival == "closed":
            raise ValueError(f"arrival {self.load.arrival!r}: take constant, poisson or bursts")
        for each in self.workloads:
            replace(self.load, workload=each).asks(texts=Texts())


@dataclass(frozen=True)
class Point:
    """One run of one side."""

    side: str
    workload: str
    kind: Literal["search", "level"]
    figures: Figures
    held: bool
    """Whether the objective did."""
    kv_cache_usage: float
    """Mean over the measured seconds, NaN where the server does not say."""
    prefix_hits: float
    prefix_queries: float
    """Tokens that were looked up in the prefix cache during the run, and those found; NaN as above."""
    client: Client


@dataclass
class Results:
    """All that was measured."""

    plan: Plan
    described: dict[str, str]
    versions: dict[str, str]
    points: list[Point] = field(default_factory=list)
    served: dict[str, dict[str, float]] = field(default_factory=dict)
    """By workload and side: the highest rate within the promise, requests a second."""
    gain: dict[str, Interval] = field(default_factory=dict)
    """By workload: B's highest rate over A's."""
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {side: [] for side in SIDES})
    capacity: dict[str, float] = field(default_factory=dict)
    """KV cache, in tokens."""
    distributions: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """By workload, side, and ttft or itl: quantiles at equal load, 0 to 1 in steps of 0.005, in seconds."""
    seconds: float = 0.0
    pairs: dict[str, int] = field(default_factory=dict)
    """By workload: the pairs of runs at equal load that were meant to be made."""
    complete: bool = False
    """Whether all was measured that there was time for; not so in what is saved on the way."""

    @property
    def confidence(self) -> float:
        """Of each workload's interval, so that all verdicts hold together."""
        return 1 - (1 - CONFIDENCE) / len(self.plan.workloads)

    def runs(self, workload: str, side: str, kind: str = "") -> list[Point]:
        """The runs of one side."""
        return [
            each for each in self.points if (each.workload, each.side) == (workload, side) and kind in ("", each.kind)
        ]


def errors_of(points: list[Point]) -> dict[str, int]:
    """Errors by kind, but for requests of runs that were ended early."""
    counts: dict[str, int] = {}
    for point in points:
        for kind, count in point.figures.errors.items():
            if kind != GIVEN_UP:
                counts[kind] = counts.get(kind, 0) + count
    return counts
