"""GuideLLM's benchmarks.json as one side of a comparison: each of its benchmarks at a rate is a run.

Written for GuideLLM 0.8 (schema version 2). It keeps when the first and the last token of an answer came and how many
there were, so the gaps between them are known as their mean alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.answer import CUT, Answer

VERSION = 2


@dataclass(frozen=True)
class Benchmark:
    """One of them."""

    rate: float
    """Requests a second."""
    start: float
    end: float
    answers: tuple[Answer, ...]


def read_guidellm(file: Path) -> list[Benchmark]:
    """Its benchmarks, by rate.

    Raises:
        ValueError: where the file is none of GuideLLM's, or has no benchmark at a rate.

    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["metadata"]["version"] != VERSION:
            raise ValueError(f"its schema's version is {document['metadata']['version']}, and {VERSION} is read")
        found = [
            _benchmark(each, place)
            for place, each in enumerate(document["benchmarks"])
            if each["config"]["strategy"].get("rate")
        ]
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; name GuideLLM's benchmarks.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file.name}: no benchmarks.json of GuideLLM 0.8 ({error!s:.80})") from error
    if not found:
        raise ValueError(
            f"{file.name}: it has no benchmark at a rate; run GuideLLM with --profile kind=constant,rate=…"
        )
    return sorted(found, key=lambda each: each.rate)


def _benchmark(row: dict[str, Any], place: int) -> Benchmark:
    answers = [
        _answer(each, f"guidellm-{place}-{number}", error)
        for kind, error in (("successful", None), ("incomplete", CUT), ("errored", "error"))
        for number, each in enumerate(row["requests"][kind] or ())
        if each["info"]["timings"]["request_start"]
    ]
    rate = float(row["config"]["strategy"]["rate"])
    return Benchmark(rate, float(row["start_time"]), float(row["end_time"]), tuple(answers))


def _answer(row: dict[str, Any], name: str, error: str | None) -> Answer:
    timings = row["info"]["timings"]
    sent = float(timings["request_start"])
    end = float(timings["request_end"] or timings["resolve_end"] or sent)
    times: tuple[float, ...] = ()
    if timings["first_token_iteration"]:
        last = timings["last_token_iteration"] or timings["first_token_iteration"]
        times = tuple(np.linspace(timings["first_token_iteration"], last, max(timings["token_iterations"], 1)).tolist())
    tokens = int(row["output_tokens"] or len(times))
    return Answer(
        "guidellm",
        name,
        float(timings["targeted_start"] or sent),
        sent,
        end,
        times,
        int(row["prompt_tokens"] or 0),
        tokens,
        tokens,
        error=error,
    )
