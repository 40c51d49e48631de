"""One measured run: Locust in a process of its own, and the figures of what it recorded."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from loadtests.answer import Answer, Objective, read_answers
from loadtests.statistics import Figures, figures

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
DRAIN_SECONDS = 120.0


@dataclass(frozen=True)
class Settings:
    """How a run asks; see `locust -f loadtests/locustfile.py --help`."""

    workload: str = "chat"
    api: str = "completions"
    scale: float = 1.0
    arrival: str = "poisson"
    warmup: float = 5.0
    duration: float = 30.0
    vocab_size: int = 32_000
    tokenizer: str = ""
    model: str = ""
    trace: str = ""
    burst: int = 8


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    figures: Figures
    answers: list[Answer]
    start: float
    """Of the measured seconds, Unix time."""


def run(url: str, settings: Settings, objective: Objective, rate: float, seed: int) -> Run:
    """Ask `url` at `rate` requests a second until all measured requests are answered or the objective is out of reach.

    Raises:
        ValueError: where Locust could not ask at all.

    """
    wanted = replace(settings, warmup=min(settings.warmup, settings.duration))
    drain(url)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        promise = {
            "objective-ttft": objective.ttft,
            "objective-itl": objective.itl,
            "objective-goodput": objective.goodput,
        }
        given = vars(wanted) | promise | {"rate": rate, "seed": seed, "records": records}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value != ""]
        locust(url, [*options, "--users=1"], limit=10 * (wanted.warmup + wanted.duration) + 600)
        answers = read_answers([records])
    if not answers:
        raise ValueError(f"{url}: no request was sent in {wanted.duration:g} s at {rate:g} a second; ask for longer")
    # Its first request is due with the first arrival; the schedule starts before.
    start = _started(answers, wanted, rate, seed) + wanted.warmup
    return Run(figures(answers, objective, start, start + wanted.duration, rate), answers, start)


def locust(url: str, options: list[str], limit: float = 3600) -> int:
    """Run this folder's Locust file without a web page; returns its exit code, 1 where requests failed.

    Raises:
        ValueError: where it could not ask, or did not end in `limit` seconds.

    """
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    try:
        done = subprocess.run(
            [*command, "--loglevel=WARNING", *options], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{url}: Locust did not end in {limit:g} s; ask for less at once") from None
    if done.returncode not in (0, 1):
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines() or ["?"]
        raise ValueError(f"{url}: Locust ended with {done.returncode}: {lines[-1]}")
    return done.returncode


def drain(url: str) -> None:
    """Wait until the server has nothing left of an earlier run, where its `/metrics` tells."""
    from loadtests.metrics import scrape

    end = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < end:
        try:
            now = scrape(url)
        except (httpx.HTTPError, ValueError):
            return
        if now.get("running", 0) + now.get("waiting", 0) == 0:
            return
        time.sleep(0.2)


def _started(answers: list[Answer], settings: Settings, rate: float, seed: int) -> float:
    """When the schedule began."""
    from loadtests.arrivals import schedule
    from loadtests.workloads import read_trace

    if settings.arrival == "trace":
        return answers[0].intended - read_trace(Path(settings.trace))[0].arrival
    return answers[0].intended - next(schedule(settings.arrival, rate, seed, settings.burst))
