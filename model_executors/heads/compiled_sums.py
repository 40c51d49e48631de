"""What `Spelling.sums` does, compiled for a CPU: the same to the bit, in one pass that stays within its caches.

For processes in which no engine starts afterwards, since once numba is imported, vLLM 0.32 cannot register its kernels;
and where torch's OpenMP is preloaded, or numba brings threads of its own that fight torch's for the cores. vLLM's
workers are such.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# A worker's main thread is bound to one core by now, which numba would take for all there are.
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))

import numba

TOKENS_AT_ONCE = 64


def _compiled(function: Callable[..., None]) -> Any:
    """Kept on disk, where there is a folder for it."""
    try:
        return numba.njit(parallel=True, nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(parallel=True, nogil=True)(function)


@_compiled
def _of_one_row(slots: np.ndarray, offsets: np.ndarray, row: np.ndarray, out: np.ndarray) -> None:
    """`[slots]` to `[vocab_size]`."""
    for token in numba.prange(len(out)):
        total = np.float32(0)
        for at in range(offsets[token], offsets[token + 1]):
            total += row[slots[at]]
        out[token] = total


@_compiled
def _of_rows(slots: np.ndarray, offsets: np.ndarray, upright: np.ndarray, out: np.ndarray) -> None:
    """`[slots, rows]` to `[rows, vocab_size]`; a block of tokens is summed for all rows at once, and then turned."""
    rows, tokens = out.shape
    for block in numba.prange(-(-tokens // TOKENS_AT_ONCE)):
        first = block * TOKENS_AT_ONCE
        last = min(tokens, first + TOKENS_AT_ONCE)
        sums = np.zeros((last - first, rows), np.float32)
        for token in range(first, last):
            for at in range(offsets[token], offsets[token + 1]):
                for row in range(rows):
                    sums[token - first, row] += upright[slots[at], row]
        for row in range(rows):
            for token in range(first, last):
                out[row, token] = sums[token - first, row]


class CompiledSums:
    """The sums of one vocabulary."""

    def __init__(self, slots: torch.Tensor, offsets: torch.Tensor) -> None:
        """`slots` are those of all tokens, one token after the other; `offsets` `[vocab_size]` where each one's begin.

        Both kernels are compiled now, and not while a request waits.
        """
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        # Unsigned, or every access would look whether it counts from the end.
        self.slots = slots.numpy().astype(np.uint16)
        self.offsets = np.append(offsets.numpy(), len(slots)).astype(np.uint32)
        places = int(slots.max()) + 1
        for rows in (1, 2):
            self(torch.zeros(rows, places, dtype=torch.float32))

    def __call__(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to `[rows, vocab_size]`, in float32, one row or more."""
        out = torch.empty(len(log_probabilities), len(self.offsets) - 1, dtype=torch.float32)
        if len(out) == 1:
            _of_one_row(self.slots, self.offsets, log_probabilities[0].numpy(), out[0].numpy())
        else:
            _of_rows(self.slots, self.offsets, log_probabilities.T.contiguous().numpy(), out.numpy())
        return out
