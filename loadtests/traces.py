"""Traces of real traffic: when requests came, how long they were, and what their prompts had in common.

Three forms are read, told apart by their first line:

- ours, JSON lines of `{"arrival": seconds, "prompt_tokens": n, "answer_tokens": n}`;
- Mooncake's (arXiv 2407.00079), JSON lines of `{"timestamp": milliseconds, "input_length": n, "output_length": n,
  "hash_ids": [n, …]}`, where each hash id is a block of 512 tokens of the prompt, the same tokens for the same id;
- BurstGPT's (arXiv 2401.17644), CSV with `Timestamp` (seconds), `Request tokens` and `Response tokens`; its lines with
  no response are requests that failed there, and are left out.
"""

import csv
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Traced:
    """One line of a trace."""

    arrival: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's blocks of tokens, from its beginning."""

    def __post_init__(self) -> None:
        if not (0 <= self.arrival < math.inf) or self.prompt_tokens < 1 or self.answer_tokens < 1:
            raise ValueError


def read_trace(file: Path) -> tuple[Traced, ...]:
    """Its requests, in the order of arrival.

    Raises:
        ValueError: naming the line that is none.

    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"trace {file}: {getattr(error, 'strerror', None) or error}; name a text file") from error
    traced = _read_csv(file, lines) if lines and lines[0].startswith("Timestamp,") else _read_json(file, lines)
    if not traced:
        raise ValueError(f"trace {file.name}: it has no lines")
    return tuple(sorted(traced, key=lambda each: each.arrival))


def _read_json(file: Path, lines: list[str]) -> list[Traced]:
    wanted = '{"arrival": seconds, "prompt_tokens": n, "answer_tokens": n}, nor Mooncake\'s form'

    def read(line: str) -> Traced:
        row = json.loads(line)
        if "input_length" not in row:
            return Traced(float(row["arrival"]), int(row["prompt_tokens"]), int(row["answer_tokens"]))
        blocks = tuple(int(each) for each in row.get("hash_ids", ()))
        return Traced(float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]), blocks)

    return [_line(file, number, line, read, wanted) for number, line in enumerate(lines, 1)]


def _read_csv(file: Path, lines: list[str]) -> list[Traced]:
    names = next(csv.reader(lines[:1]))
    wanted = "a line of Timestamp, Request tokens and Response tokens"

    def read(line: str) -> Traced | None:
        row = dict(zip(names, next(csv.reader([line])), strict=True))
        answered = int(float(row["Response tokens"]))
        return Traced(float(row["Timestamp"]), int(float(row["Request tokens"])), answered) if answered else None

    found = [_line(file, number, line, read, wanted) for number, line in enumerate(lines[1:], 2)]
    return [each for each in found if each is not None]


def _line(file: Path, number: int, line: str, read: Callable[[str], Any], wanted: str) -> Any:
    try:
        return read(line)
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration, OverflowError, RecursionError) as error:
        raise ValueError(f"trace {file.name}, line {number}: {line[:60]!r} is not {wanted}") from error


def arrivals(trace: Sequence[Traced], speed: float = 1.0, again: bool = False) -> Iterator[float]:
    """When its requests are to be sent, `speed` times as fast; with `again` without end, and beginning at once."""
    if not again:
        yield from (each.arrival / speed for each in trace)
        return
    first, lap_seconds = trace[0].arrival, trace[-1].arrival - trace[0].arrival + 1 / mean_rate(trace)
    for lap in itertools.count():
        yield from ((each.arrival - first + lap * lap_seconds) / speed for each in trace)


def mean_rate(trace: Sequence[Traced]) -> float:
    """Requests a second, from one arrival to the next."""
    span = trace[-1].arrival - trace[0].arrival
    return (len(trace) - 1) / span if span > 0 else 1.0
