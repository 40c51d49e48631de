"""What this machine reaches in plain products: the roof that ideals are under.

A part of an engine's step (`vllm_ext/costs.py`) needs floating-point operations and moves bytes, and takes

    seconds = max(operations / F, bytes / B)

where F and B are what this machine reaches in a plain matrix product and in plainly reading memory, and a step takes
the sum of its parts. In a long prefill every part is bound by F, so that the ratio of two plans is that of their
operations; in a decode of one stream by B, so that it is that of the bytes of weights and KV cache. Where streams are
many, some parts are bound by the one and some by the other. An ideal is what nothing but the products would take.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_ext.costs import Part

REPEATS = 9


@dataclass(frozen=True)
class Sizes:
    """Of the products that a kind of device is measured with."""

    rows: int
    wide: int
    deep: int
    bytes: int


SIZES = {"cpu": Sizes(1024, 3072, 1024, 2**29), "cuda": Sizes(8192, 8192, 8192, 2**32)}


@dataclass(frozen=True)
class Machine:
    """What plain products reach."""

    flops: float
    """Operations a second."""
    bandwidth: float
    """Bytes a second."""

    def seconds(self, parts: Sequence[Part]) -> float:
        """Of all parts, one after another."""
        return sum(max(part.flops / self.flops, part.bytes / self.bandwidth) for part in parts)


def measured(element_bytes: int = 2, device: str = "") -> Machine:
    """Of weights that take so many bytes each, on the GPU where there is one: of a product of rows with a matrix, which
    on a CPU a cache can hold, and of reading what is far larger than caches.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, sizes = {2: torch.bfloat16, 4: torch.float32}[element_bytes], SIZES[device]
    rows = torch.randn(sizes.rows, sizes.deep, device=device).to(dtype)
    matrix = torch.randn(sizes.wide, sizes.deep, device=device).to(dtype)
    large = torch.ones(sizes.bytes // 4, device=device)
    with torch.inference_mode():
        product = _best(lambda: torch.nn.functional.linear(rows, matrix), device)
        return Machine(
            flops=2 * sizes.rows * sizes.wide * sizes.deep / product, bandwidth=sizes.bytes / _best(large.amax, device)
        )


def _best(run: Callable[[], object], device: str) -> float:
    """The shortest of some runs: a roof is what is reached when nothing else runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)
