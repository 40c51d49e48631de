"""One measured run: Locust in a process of its own, and the figures of what it recorded."""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from loadtests.answer import Answer, Objective, read_answers
from loadtests.metrics import scrape
from loadtests.options import arguments
from loadtests.settings import Load
from loadtests.statistics import Figures, figures
from loadtests.texts import Texts
from loadtests.watch import Client, together

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
RAISED = re.compile(r"\b(error|\w+(Error|Exception)):")
DRAIN_SECONDS = 120.0
WARM_UP_USERS = 8
LEAST_REQUESTS = 5
"""A run at a low rate takes longer, until it is meant to have so many: one without requests would say nothing."""


@dataclass(frozen=True)
class Run:
    """What one run gave."""

    figures: Figures
    answers: list[Answer]
    start: float
    """Of the measured seconds, Unix time."""
    client: Client

    @property
    def measured(self) -> list[Answer]:
        """The answers behind the figures' times."""
        end = self.start + self.figures.seconds
        return [answer for answer in self.answers if answer.sound and self.start <= answer.intended < end]


def run(url: str, load: Load, objective: Objective) -> Run:
    """Ask `url` until all measured requests are answered or the objective is out of reach.

    Raises:
        ValueError: where Locust could not ask at all.

    """
    duration = max(load.duration, LEAST_REQUESTS / load.rate)
    load = replace(load, warmup=min(load.warmup, load.duration), duration=duration)
    drain(url)
    limit = 10 * (load.warmup + load.duration) + 600
    answers, client, start = recorded(url, arguments(load, objective, users=1), limit)
    if not answers:
        raise ValueError(f"{url}: no request was sent in {load.duration:g} s at {load.rate:g} a second; ask for longer")
    start += load.warmup
    return Run(figures(answers, objective, start, start + load.duration, load.rate), answers, start, client)


@dataclass
class Pace:
    """Runs of one server that begin amidst requests, by the seconds it takes for a token."""

    token_seconds: float

    def run(self, url: str, load: Load, objective: Objective) -> Run:
        """As `run`; one that held the objective tells the seconds anew, since an overloaded server's tell of that."""
        done = run(url, replace(load, under_way=requests_under_way(load, self.token_seconds)), objective)
        if done.figures.held(objective) and math.isfinite(done.figures.tpot[0]):
            self.token_seconds = done.figures.tpot[0]
        return done


def requests_under_way(load: Load, token_seconds: float) -> int:
    """Requests in flight at its rate, by Little's law."""
    return round(load.rate * load.asks(texts=Texts()).mean_answer * token_seconds)


def warm_up(url: str, load: Load) -> tuple[float, float]:
    """Ask in a closed loop for as long as a run; returns what it served, as a first guess at saturation.

    In requests a second, counted by their tokens, prompts' and answers', since long ones do not end in that time; and
    seconds a token of an answer.
    """
    seconds = load.warmup + load.duration
    users = {"users": WARM_UP_USERS, "spawn_rate": WARM_UP_USERS, "run_time": f"{math.ceil(seconds)}s"}
    answers, _, _ = recorded(url, arguments(replace(load, arrival="closed"), **users), limit=seconds + 300)
    start = min((answer.sent for answer in answers), default=0.0)
    found = figures(answers, Objective(math.inf, math.inf), start, start + seconds)
    prompts = sum(answer.prompt_tokens for answer in answers if answer.times) / seconds
    served = (prompts + found.tokens_per_second) / load.asks(texts=Texts()).mean_tokens
    return max(served, 1 / seconds), found.tpot[0] if math.isfinite(found.tpot[0]) else 0.0


def recorded(url: str, given: list[str], limit: float) -> tuple[list[Answer], Client, float]:
    """Run Locust; returns the answers, what the client says of itself, which voids nothing here, and when the schedule
    began.

    Raises:
        ValueError: as `locust` does, and where its time was over before it had begun.

    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        locust(url, [*given, *arguments(records=records, client_bound=math.inf)], limit)
        if not records.exists():
            raise ValueError(f"{url}: /v1/models was not answered while a run lasts; give a longer --duration")
        return read_answers([records]), *read_account([records])


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
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        lines = [line for line in done.stderr.splitlines() if RAISED.search(line)] or done.stderr.splitlines() or ["?"]
        raise ValueError(f"{url}: Locust ended with {done.returncode}: {lines[-1]}")
    return done.returncode


def drain(url: str) -> None:
    """Wait until the server has nothing left of an earlier run, where its `/metrics` tells."""
    end = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < end:
        try:
            now = scrape(url)
        except (httpx.HTTPError, ValueError):
            return
        if now.get("running", 0) + now.get("waiting", 0) == 0:
            return
        time.sleep(0.2)


def read_account(files: Iterable[Path]) -> tuple[Client, float]:
    """What the client's processes say of themselves in those records, and when the schedule began."""
    rows = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    clients = [Client(**row["client"] | {name: tuple(row["client"][name]) for name in ("lag", "late")}) for row in rows]
    return together(clients), min(row["start"] for row in rows)
