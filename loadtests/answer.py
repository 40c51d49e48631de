"""One request as the client saw it: what every figure is taken from.

Times are Unix seconds that advance with the monotonic clock, so that processes of one machine can be laid side by side.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from loadtests.options import option

GIVEN_UP = "given up"
"""The error of a request under way when a run ended early, because its objective was out of reach."""
CUT = "cut off"
"""The error of a request under way when a run ended with its measured seconds; what came of it counts."""
_EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Unix seconds that are never set back."""
    return _EPOCH + time.perf_counter()


@dataclass(frozen=True)
class Answer:
    """A streamed answer, or what came instead of one."""

    profile: str
    id: str
    """As the server was told it, in `X-Request-Id`."""
    intended: float
    """When the schedule wanted it sent. Latency counts from here, so a client that is late hides nothing."""
    sent: float
    end: float
    times: tuple[float, ...] = ()
    """When each chunk with tokens arrived; a chunk may hold several tokens."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    """Both as the server's usage has them; of a request cut off, what was asked and the chunks that came."""
    asked_tokens: int = 0
    """How long an answer was asked for."""
    size: int = 0
    """Bytes received."""
    error: str | None = None
    """Its kind: `HTTP 503`, `connect`, `timeout`, `dropped`, `error event`, `no usage`, `client at its cap`."""
    counts: tuple[int, ...] = ()
    """Tokens of each chunk, where the server counts as it goes."""
    cached_tokens: int | None = None
    """Of the prompt, found in the prefix cache, where the server says."""
    right: bool | None = None
    """Whether the answer is right, where that is known."""

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong with it, as far as it was seen."""
        return self.error in (None, CUT)

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds; infinite where none came."""
        return self.times[0] - self.intended if self.times else float("inf")

    @property
    def latency(self) -> float:
        """Seconds until the answer's end."""
        return self.end - self.intended

    @cached_property
    def gaps(self) -> np.ndarray:
        """Inter-token latencies: seconds between one chunk with tokens and the next."""
        return np.diff(self.times)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first chunk, in seconds, by the server's count; None for a single one."""
        if len(self.times) < 2 or self.answer_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.answer_tokens - 1)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each chunk: as the server counts them, or else its count of all in equal parts."""
        if len(self.counts) == len(self.times):
            return np.array(self.counts, float)
        return np.full(len(self.times), self.answer_tokens / max(len(self.times), 1))

    def good(self, objective: "Objective") -> bool:
        """Whether it was answered within the objective, as far as it was seen."""
        if not self.sound or self.ttft > objective.ttft:
            return False
        return len(self.gaps) == 0 or float(np.quantile(self.gaps, objective.quantile)) <= objective.itl


@dataclass(frozen=True)
class Objective:
    """A latency promise: so many of the answers are to be good."""

    ttft: float = option(2.0, "The promise: seconds to a request's first token.")
    itl: float = option(0.2, "The promise: seconds between chunks of tokens, for 95% of an answer's gaps.")
    goodput: float = option(0.95, "The part of requests that must be answered within the promise.")
    quantile: float = 0.95

    def __post_init__(self) -> None:
        if not (self.ttft > 0 and self.itl > 0):
            raise ValueError(f"objective of TTFT {self.ttft:g} s and ITL {self.itl:g} s: both must be above 0")
        if not 0 < self.goodput <= 1:
            raise ValueError(f"goodput {self.goodput:g}: it is a part of all requests; give one in (0, 1]")


def write_line(answer: Answer) -> str:
    """The answer as a line of JSON."""
    return json.dumps(asdict(answer)) + "\n"


def read_answers(files: Iterable[Path]) -> list[Answer]:
    """All answers of these files, in the order in which they were meant to be sent."""
    answers = []
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if "client" not in row:
                answers.append(Answer(**row | {"times": tuple(row["times"]), "counts": tuple(row["counts"])}))
    return sorted(answers, key=lambda answer: answer.intended)
