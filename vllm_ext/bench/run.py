"""Rounds of fresh processes, stock and variant in turn, and what each measured."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from vllm_ext import openmp
from vllm_ext.bench.work import Work
from vllm_ext.errors import UsageError
from vllm_ext.process import LOG_LINES, RAISED
from vllm_ext.progress import progress

SAMPLE_SECONDS = 0.2
STOP_SECONDS = 30


@dataclass(frozen=True)
class Candidate:
    """A model as an engine is to serve it."""

    model: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    vllm_args: Sequence[str] = ()
    prose: Sequence[int] = ()
    """Token ids that prompts are cut from; without any they are random."""


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


def rounds(
    candidates: Mapping[str, Candidate], work: Sequence[str], count: int, repeats: int, seed: int
) -> dict[str, list[Round]]:
    """Measure every candidate `count` times; who goes first changes, so that none profits from the machine's drift.

    Raises:
        UsageError: where an engine does not start, or fails.

    """
    found: dict[str, list[Round]] = {name: [] for name in candidates}
    # A start takes about as long as so many tokens; with that the estimate is right within a factor of two.
    start = 20_000
    total = count * len(candidates) * (start + sum(_weight(text, repeats) for text in work))
    with progress() as bars:
        task = bars.add_task("", total=total)
        for turn in range(count):
            order = list(candidates)[:: 1 if turn % 2 == 0 else -1]
            for name in order:
                where = f"round {turn + 1}/{count}: {name}"
                bars.update(task, description=f"{where} starts")

                def seen(text: str, where: str = where) -> None:
                    bars.update(task, advance=_weight(text, repeats) if text else start, description=where)

                found[name].append(_measure(candidates[name], work, repeats, seed + turn, seen))
    return found


def _weight(text: str, repeats: int) -> int:
    work = Work.parse(text)
    return work.tokens * (1 if work.kind == "decode" else repeats)


def _measure(candidate: Candidate, work: Sequence[str], repeats: int, seed: int, seen: Any) -> Round:
    """One fresh process."""
    with tempfile.TemporaryDirectory(prefix="vllm-ext-bench-") as folder:
        out, log = Path(folder) / "measured.jsonl", Path(folder) / "log"
        out.touch()
        asked = {
            "model": candidate.model,
            "overrides": dict(candidate.overrides),
            "vllm_args": list(candidate.vllm_args),
            "work": list(work),
            "repeats": repeats,
            "seed": seed,
            "prose": list(candidate.prose),
            "out": str(out),
        }
        # By itself vLLM would take nearly all memory for the KV cache of a CPU, and time how that is found.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment = openmp.preloading(environment)
        began = time.time()
        with log.open("w") as written:
            command = [sys.executable, "-m", "vllm_ext.bench.worker"]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=written, stderr=written, text=True, env=environment
            )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            watch = _Memory(process.pid)
            found = _follow(process, out, began, seen)
            found.peak_bytes = watch.stop()
        finally:
            _end(process)
        if process.returncode != 0:
            raise UsageError(_failed(process.returncode, log.read_text(errors="replace")))
        return found


def _follow(process: subprocess.Popen[str], out: Path, began: float, seen: Any) -> Round:
    """Read what the process writes, line by line, until it ends."""
    found, read, ended = Round(), 0, False
    while not ended:
        ended = process.poll() is not None
        lines = out.read_text().splitlines(keepends=True)
        for line in (line for line in lines[read:] if line.endswith("\n")):
            read += 1
            told = json.loads(line)
            if "work" in told:
                found.seconds[told["work"]] = told["seconds"]
                seen(told["work"])
            else:
                found.start_seconds = told.pop("ready") - began
                for name, value in told.items():
                    setattr(found, name, value)
                seen("")
        if not ended:
            time.sleep(0.5)
    return found


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


def _end(process: subprocess.Popen[str]) -> None:
    """End what is still running, and what it started."""
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            each.terminate()
        for each in psutil.wait_procs(tree, STOP_SECONDS)[1]:
            each.kill()
        process.wait()


def _failed(code: int, log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    Console(stderr=True, highlight=False).print("\n".join(lines[-LOG_LINES:]), markup=False)
    cause = next((f" ({match[1]})" for line in lines if (match := RAISED.search(line))), "")
    return f"an engine ended with code {code}{cause}; the end of its log is above"
