"""Rounds of fresh processes, stock and variant in turn, and what each measured."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import psutil

from vllm_ext.bench.work import Work
from vllm_ext.engine import Engine
from vllm_ext.progress import progress
from vllm_ext.served import Served

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Candidate:
    """A model as an engine is to serve it."""

    served: Served
    vllm_args: Sequence[str] = ()
    prose: Sequence[int] = ()
    """Token ids that prompts are cut from; without any they are random."""


@dataclass(frozen=True)
class BenchSettings:
    """How it is measured."""

    work: tuple[str, ...]
    count: int = 3
    """Rounds."""
    repeats: int = 3
    """How often a prompt is timed in a process."""
    seed: int = 0
    interleaved: bool = False
    """All engines of a round are up at once and take turns step by step, one at work and the others waiting."""


@dataclass(frozen=True)
class Asked:
    """What a process is to measure."""

    candidate: Candidate
    settings: BenchSettings
    seed: int


@dataclass
class Round:
    """What one process measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By work: of each step, or of each whole prompt."""
    start_seconds: float = 0
    """From the process's start until the engine can be asked."""
    peak_bytes: int = 0
    """Resident memory of the process and all that it started, at its highest; the KV cache included."""
    kv_capacity_tokens: int = 0
    max_model_len: int = 0
    element_bytes: int = 0
    threads: int = 0


def rounds(candidates: Mapping[str, Candidate], settings: BenchSettings) -> dict[str, list[Round]]:
    """Measure every candidate in every round; who goes first changes, so that none profits from the machine's drift.

    Raises:
        UsageError: where an engine does not start, or fails.

    """
    found: dict[str, list[Round]] = {name: [] for name in candidates}
    # A start takes about as long as so many tokens; with that the estimate is right within a factor of two.
    start, count, repeats = 20_000, settings.count, settings.repeats
    total = count * len(candidates) * (start + sum(_weight(text, repeats) for text in settings.work))
    with progress() as bars:
        task = bars.add_task("", total=total)
        for turn in range(count):
            order = list(candidates)[:: 1 if turn % 2 == 0 else -1]
            for names in [order] if settings.interleaved else [[name] for name in order]:
                with ExitStack() as stack:
                    engines = {}
                    for name in names:
                        bars.update(task, description=f"round {turn + 1}/{count}: {name} starts")
                        measurement = Measurement(candidates[name], settings, settings.seed + turn)
                        engines[name] = stack.enter_context(measurement)
                        measurement.start()
                        bars.advance(task, start)
                    bars.update(task, description=f"round {turn + 1}/{count}: {' and '.join(names)}")
                    at_work = dict(engines)
                    while at_work:
                        for name in tuple(at_work):
                            if text := at_work[name].advance():
                                bars.advance(task, _weight(text, repeats) / Work.parse(text).samples(repeats))
                            else:
                                found[name].append(at_work.pop(name).round)
    return found


def _weight(text: str, repeats: int) -> int:
    work = Work.parse(text)
    return work.tokens * (1 if work.kind == "decode" else repeats)


class Measurement(Engine):
    """A process with one engine, which works when it is told to and tells what it measured."""

    def __init__(self, candidate: Candidate, settings: BenchSettings, seed: int) -> None:
        self.round, self.candidate, self.settings, self.seed = Round(), candidate, settings, seed
        self.began = time.time()
        super().__init__("vllm_ext.bench.worker:work")
        self.memory = _Memory(self.pid)

    def start(self) -> None:
        """Return once the engine can be asked."""
        self.send(Asked(self.candidate, self.settings, self.seed))
        told = self.receive()
        self.round.start_seconds = told.pop("ready") - self.began
        for name, value in told.items():
            setattr(self.round, name, value)

    def advance(self) -> str | None:
        """Let it measure one step, or one whole prompt, more; returns of which work that was, or None at the end."""
        self.send(None)
        told = self.receive()
        if told is None:
            self.round.peak_bytes = self.memory.stop()
            return None
        work, seconds = told
        self.round.seconds.setdefault(work, []).append(seconds)
        return str(work)

    def __exit__(self, *unused: object) -> None:
        self.memory.stop()
        super().__exit__()


class _Memory:
    """Watches a process tree's resident memory."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.over = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(SAMPLE_SECONDS):
            try:
                top = psutil.Process(self.pid)
                tree = [top, *top.children(recursive=True)]
                self.peak = max(self.peak, sum(each.memory_info().rss for each in tree))
            except psutil.Error:  # one has ended meanwhile
                continue

    def stop(self) -> int:
        """The peak, in bytes."""
        self.over.set()
        self.thread.join()
        return self.peak
