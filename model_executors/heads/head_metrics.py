"""Counters of the head, kept in the engine's process.

They reach `/metrics` through prometheus-client's multiprocess files, which `vllm-ext serve` sets up.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from prometheus_client import Counter, Histogram

LABELS = ("model_name",)
CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@cache
def _rows() -> Counter:
    return Counter("vllm_ext_head_rows", "Rows of logits by the head that made them.", (*LABELS, "head"))


@cache
def _seconds() -> Counter:
    return Counter("vllm_ext_head_seconds", "Time in the head, as the host sees it.", LABELS)


@cache
def _confidence() -> Histogram:
    name, documentation = (
        "vllm_ext_head_confidence",
        "Probability of a row's best spelled token, or where those are rescored of all of them.",
    )
    return Histogram(name, documentation, LABELS, buckets=CONFIDENCES)


class HeadMetrics:
    """Of one model; without multiprocess files nothing is kept, since nobody could read it."""

    def __init__(self, model_name: str) -> None:
        self.kept = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self.model_name = model_name
        self.on_device: _DeviceCount | None = None

    @contextmanager
    def timed(self, own: int, stock: int) -> Iterator[None]:
        """Count these rows, and the time that passes."""
        start = time.perf_counter()
        yield
        self.count(own, stock, time.perf_counter() - start)

    def count(self, own: int, stock: int, seconds: float) -> None:
        """Rows that the head answered itself, and that the stock one did, and how long that took."""
        if not self.kept:
            return
        for head, number in (("own", own), ("stock", stock)):
            _rows().labels(self.model_name, head).inc(number)
        _seconds().labels(self.model_name).inc(seconds)

    def count_masked(self, stock: torch.Tensor, seconds: float) -> None:
        """As `count`, of rows `[rows]` that are true on the device where the stock head answered. The host does not
        wait for them: what it can read by now is counted, and the rest at a later call.
        """
        if not self.kept:
            return
        self.on_device = self.on_device or _DeviceCount(stock.device)
        number = self.on_device.add(stock)
        self.count(len(stock) - number, number, seconds)

    def observe(self, log_probabilities: torch.Tensor) -> None:
        """`[rows]`, by which rows are believed or not; on a CPU only, since elsewhere the host would wait for them."""
        if not self.kept or log_probabilities.device.type != "cpu":
            return
        for probability in log_probabilities.exp().tolist():
            _confidence().labels(self.model_name).observe(probability)


class _DeviceCount:
    """How many rows were true, added up on a device, and copied to the host without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.long, device=device)
        self.copy = torch.zeros((), dtype=torch.long, pin_memory=device.type == "cuda")
        self.read = 0

    def add(self, rows: torch.Tensor) -> int:
        """Add `[rows]` of bool; returns how many more there are, of those that have reached the host."""
        self.total += rows.sum()
        self.copy.copy_(self.total, non_blocking=True)
        arrived = int(self.copy)
        new, self.read = arrived - self.read, arrived
        return new
