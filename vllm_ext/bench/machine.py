"""What this machine reaches in plain products: the roof that ideals are under."""

import time
from collections.abc import Callable

import torch

from vllm_ext.bench.ideal import Machine

ROWS, WIDE, DEEP = 1024, 3072, 1024
BYTES = 2**29
REPEATS = 9


def measured(element_bytes: int = 2) -> Machine:
    """Of weights that take so many bytes each: of a product of 1,024 rows with a matrix that a cache can hold, and of
    reading what is far larger than caches.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32}[element_bytes]
    rows, matrix = torch.randn(ROWS, DEEP).to(dtype), torch.randn(WIDE, DEEP).to(dtype)
    large = torch.ones(BYTES // 4)
    with torch.inference_mode():
        return Machine(
            flops=2 * ROWS * WIDE * DEEP / _best(lambda: torch.nn.functional.linear(rows, matrix)),
            bandwidth=BYTES / _best(large.amax),
        )


def _best(run: Callable[[], object]) -> float:
    """The shortest of some runs: a roof is what is reached when nothing else runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
