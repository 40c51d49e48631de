"""Rounds of fresh processes, stock and variant in turn, and what each measured."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import psutil

from vllm_ext import openmp
from vllm_ext.bench.work import Work
from vllm_ext.errors import UsageError
from vllm_ext.process import STOP_SECONDS, show_end
from vllm_ext.progress import progress

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Candidate:
    """A model as an engine is to serve it."""

    model: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    vllm_args: Sequence[str] = ()
    prose: Sequence[int] = ()
    """Token ids that prompts are cut from; without any they are random."""


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    work: tuple[str, ...]
    count: int = 3
    """Rounds."""
    repeats: int = 3
    """How often a prompt is timed in a process."""
    seed: int = 0
    interleaved: bool = False
    """All engines of a round are up at once and take turns step by step, one at work and the others waiting."""


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


def rounds(candidates: Mapping[str, Candidate], settings: Settings) -> dict[str, list[Round]]:
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
                        engine = _Engine(candidates[name], settings, settings.seed + turn)
                        engines[name] = stack.enter_context(engine)
                        bars.advance(task, start)
                    bars.update(task, description=f"round {turn + 1}/{count}: {' and '.join(names)}")
                    at_work = dict(engines)
                    while at_work:
                        for name in tuple(at_work):
                            if text := at_work[name].advance():
                                bars.advance(task, _weight(text, repeats) / Work.parse(text).samples(repeats))
                            else:
                                found[name].append(at_work.pop(name).found)
    return found


def _weight(text: str, repeats: int) -> int:
    work = Work.parse(text)
    return work.tokens * (1 if work.kind == "decode" else repeats)


class _Engine:
    """A fresh process with one engine, which works when it is told to and tells what it measured."""

    def __init__(self, candidate: Candidate, settings: Settings, seed: int) -> None:
        self.found = Round()
        self.asked = {
            "model": candidate.model,
            "overrides": dict(candidate.overrides),
            "vllm_args": list(candidate.vllm_args),
            "work": settings.work,
            "repeats": settings.repeats,
            "seed": seed,
            "prose": list(candidate.prose),
        }

    def __enter__(self) -> Self:
        """Start it, until it can be asked."""
        # By itself vLLM would take nearly all memory for the KV cache of a CPU, and time how that is found.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        read, write = os.pipe()  # vLLM logs to the other ones
        began = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm_ext.bench.worker", str(write)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            env=openmp.preloading(environment),
            pass_fds=[write],
        )
        os.close(write)
        self.told, self.memory = os.fdopen(read), _Memory(self.process.pid)
        try:
            told = self._ask(json.dumps(self.asked))
            if told is None:
                raise UsageError(self._failed())
        except BaseException:
            self.__exit__()
            raise
        self.found.start_seconds = told.pop("ready") - began
        for name, value in told.items():
            setattr(self.found, name, value)
        return self

    def advance(self) -> str | None:
        """Let it measure one step, or one whole prompt, more; returns of which work that was, or None at the end."""
        told = self._ask("")
        if told is not None:
            self.found.seconds.setdefault(told["work"], []).append(told["seconds"])
            return str(told["work"])
        self.found.peak_bytes = self.memory.stop()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        if self.process.returncode:
            raise UsageError(self._failed())
        return None

    def _ask(self, line: str) -> Any:
        """Say a line, and wait for one; None where there is none, since it has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.told.readline()
        return json.loads(answer) if answer else None

    def _failed(self) -> str:
        self.log.seek(0)
        cause = show_end(self.log.read())
        return f"an engine ended with code {self.process.wait()}{cause}; the end of its log is above"

    def __exit__(self, *unused: object) -> None:
        """End what is still running, and what it started."""
        self.memory.stop()
        if self.process.poll() is None:
            tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for each in tree:
                each.terminate()
            for each in psutil.wait_procs(tree, STOP_SECONDS)[1]:
                each.kill()
            self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.told.close()
        self.log.close()


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
