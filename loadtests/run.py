"""One measured run: Locust in a process of its own, and the figures of what it recorded."""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from loadtests.answer import Answer, Objective, read_answers
from loadtests.statistics import Figures, figures
from loadtests.workloads import Texts, Workload

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
DRAIN_SECONDS = 120.0
WARM_UP_USERS = 8
LEAST_REQUESTS = 5
"""A run at a low rate takes longer, until it is meant to have so many: one without requests would say nothing."""


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
    cut: bool = False
    """Whether a run ends with its measured seconds, or once all that was sent in them is answered."""


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    figures: Figures
    answers: list[Answer]
    start: float
    """Of the measured seconds, Unix time."""

    @property
    def measured(self) -> list[Answer]:
        """The answers behind the figures' times."""
        end = self.start + self.figures.seconds
        return [answer for answer in self.answers if answer.sound and self.start <= answer.intended < end]


def run(
    url: str,
    settings: Settings,
    objective: Objective,
    rate: float,
    seed: int,
    text_seed: int | None = None,
    under_way: int = 0,
) -> Run:
    """Ask `url` at `rate` requests a second until all measured requests are answered or the objective is out of reach.

    `text_seed` varies the texts alone; `under_way` requests are there from the start, in the middle of their answers.

    Raises:
        ValueError: where Locust could not ask at all.

    """
    duration = max(settings.duration, LEAST_REQUESTS / rate)
    wanted = replace(settings, warmup=min(settings.warmup, settings.duration), duration=duration)
    drain(url)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        promise = {
            "objective-ttft": objective.ttft,
            "objective-itl": objective.itl,
            "objective-goodput": objective.goodput,
        }
        given = vars(wanted) | promise | {"rate": rate, "seed": seed, "text_seed": text_seed, "under_way": under_way}
        limit = 10 * (wanted.warmup + wanted.duration) + 600
        locust(url, options(given | {"records": records, "users": 1}), limit)
        answers = read_answers([records])
    if not answers:
        raise ValueError(f"{url}: no request was sent in {wanted.duration:g} s at {rate:g} a second; ask for longer")
    start = _started(answers, wanted, rate, seed) + wanted.warmup
    return Run(figures(answers, objective, start, start + wanted.duration, rate), answers, start)


@dataclass
class Pace:
    """Runs of one server that begin amidst requests, by the seconds it takes for a token."""

    token_seconds: float

    def run(self, url: str, settings: Settings, objective: Objective, rate: float, seed: int, text_seed: int) -> Run:
        """As `run`; one that held the objective tells the seconds anew, since an overloaded server's tell of that."""
        under_way = requests_under_way(settings, rate, self.token_seconds)
        done = run(url, settings, objective, rate, seed, text_seed, under_way)
        if done.figures.held(objective) and math.isfinite(done.figures.tpot[0]):
            self.token_seconds = done.figures.tpot[0]
        return done


def asked(settings: Settings) -> Workload:
    """What a run asks, for its lengths."""
    return Workload(settings.workload, "", settings.api, scale=settings.scale, texts=Texts())


def requests_under_way(settings: Settings, rate: float, token_seconds: float) -> int:
    """Requests in flight at that rate, by Little's law."""
    return round(rate * asked(settings).mean_answer * token_seconds)


def warm_up(url: str, settings: Settings, seed: int) -> tuple[float, float]:
    """Ask in a closed loop for as long as a run; returns what it served, as a first guess at saturation.

    In requests a second, counted by their tokens, prompts' and answers', since long ones do not end in that time; and
    seconds a token of an answer.
    """
    seconds = settings.warmup + settings.duration
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        given = vars(settings) | {"arrival": "closed", "records": records, "seed": seed}
        users = {"users": WARM_UP_USERS, "spawn_rate": WARM_UP_USERS, "run_time": f"{math.ceil(seconds)}s"}
        locust(url, options(given | users), limit=seconds + 300)
        answers = read_answers([records])
    start = min((answer.sent for answer in answers), default=0.0)
    found = figures(answers, Objective(math.inf, math.inf), start, start + seconds)
    prompts = sum(answer.prompt_tokens for answer in answers if answer.times) / seconds
    served = (prompts + found.tokens_per_second) / asked(settings).mean_tokens
    return max(served, 1 / seconds), found.tpot[0] if math.isfinite(found.tpot[0]) else 0.0


def options(given: Mapping[str, Any]) -> list[str]:
    """As Locust reads them; what is empty is left out."""
    named = {name.replace("_", "-"): value for name, value in given.items()}
    flags = {name: value for name, value in named.items() if value is not None and value is not False and value != ""}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def locust(url: str, given: list[str], limit: float = 3600) -> int:
    """Run this folder's Locust file without a web page; returns its exit code, 1 where requests failed.

    Raises:
        ValueError: where it could not ask, or did not end in `limit` seconds.

    """
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    try:
        done = subprocess.run(
            [*command, "--loglevel=WARNING", *given], capture_output=True, text=True, timeout=limit, check=False
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
    """When the schedule began: its first request, number 0, was due with the first arrival."""
    from loadtests.arrivals import schedule
    from loadtests.workloads import read_trace

    first = next(answer for answer in answers if not answer.id.endswith("--0") and answer.id.endswith("-0"))
    if settings.arrival == "trace":
        return first.intended - read_trace(Path(settings.trace))[0].arrival
    return first.intended - next(schedule(settings.arrival, rate, seed, settings.burst))
