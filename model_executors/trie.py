"""The trie of all spellings, walked once: what tokens begin with is added up once for all of them."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from numba import njit, prange, set_num_threads
from numba.core.config import NUMBA_NUM_THREADS
from torch import nn


def _one_pool() -> bool:
    """Whether numba and torch share their threads, as the process was started with an OpenMP that comes ahead of all.

    vLLM starts its workers on a CPU so. Where they do not, each one's threads spin while the other's work, and one
    thread is faster.
    """
    started_with = Path("/proc/self/environ")  # os.environ would tell what was set since
    entries = started_with.read_bytes().split(b"\0") if started_with.is_file() else []
    return any(entry.startswith(b"LD_PRELOAD=") and b"omp" in entry for entry in entries)


ONE_POOL = _one_pool()
TILE = 16
"""Tokens of 64 bytes in float32, a cache's line."""
TILES_AT_ONCE = 32


class Trie(nn.Module):
    """Nodes in order of their depth, so that a parent comes before its children; the first is the root.

    On the processor only, and a row at a time.
    """

    def __init__(self, parents: np.ndarray, slots: np.ndarray, heads: np.ndarray, tails: np.ndarray) -> None:
        super().__init__()
        self.parents = parents
        """`[nodes]`"""
        self.slots = slots
        """`[nodes]`: which slot each adds to its parent's sum."""
        self.heads = heads
        """`[vocab_size]`: the node of all of each token but its last slot."""
        self.tails = tails
        """`[vocab_size]`: that last slot."""

    @classmethod
    def of(cls, spellings: np.ndarray) -> Self:
        """`[vocab_size, places]`: each token's slots, and a negative number after the last one."""
        lengths = (spellings >= 0).sum(1)
        heads = np.zeros(len(spellings), np.int64)
        parents, slots, nodes, widest = [heads[:1].copy()], [heads[:1].copy()], 1, int(spellings.max()) + 1
        for depth, column in enumerate(spellings.T.astype(np.int64)):
            inner = np.flatnonzero(lengths > depth + 1)
            found, which = np.unique(heads[inner] * widest + column[inner], return_inverse=True)
            heads[inner] = nodes + which
            parents.append(found // widest)
            slots.append(found % widest)
            nodes += len(found)
        tails = spellings[np.arange(len(spellings)), lengths - 1]
        return cls(*(each.astype(np.int32) for each in (np.concatenate(parents), np.concatenate(slots), heads, tails)))

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to the sum of each token's slots, from the first to the last; `[rows, vocab_size]`."""
        sums = rows.new_empty(len(rows), len(self.heads))
        set_num_threads(threads())
        _walk(rows.numpy(), self.parents, self.slots, self.heads, self.tails, sums.numpy())
        return sums


def threads() -> int:
    """For numba's part."""
    return min(torch.get_num_threads(), NUMBA_NUM_THREADS) if ONE_POOL else 1


def transposed(upright: torch.Tensor) -> torch.Tensor:
    """`[tokens, rows]` to `[rows, tokens]`, by all threads, which torch's own copy leaves idle."""
    turned = upright.new_empty(upright.shape[::-1])
    set_num_threads(threads())
    _transpose(upright.numpy(), turned.numpy())
    return turned


@njit(cache=True, parallel=True)
def _walk(
    rows: np.ndarray, parents: np.ndarray, slots: np.ndarray, heads: np.ndarray, tails: np.ndarray, sums: np.ndarray
) -> None:
    for row in prange(len(rows)):
        nodes = np.zeros(len(parents), rows.dtype)
        for node in range(1, len(parents)):
            nodes[node] = nodes[parents[node]] + rows[row, slots[node]]
        for token in range(len(heads)):
            sums[row, token] = nodes[heads[token]] + rows[row, tails[token]]


@njit(cache=True, parallel=True)
def _transpose(upright: np.ndarray, turned: np.ndarray) -> None:
    tokens, rows = upright.shape
    at_once = TILE * TILES_AT_ONCE
    for part in prange((tokens + at_once - 1) // at_once):
        for start in range(part * at_once, min(tokens, (part + 1) * at_once), TILE):
            if start + TILE <= tokens:  # a number known beforehand, so that the compiler can unroll it
                for row in range(rows):
                    for token in range(TILE):
                        turned[row, start + token] = upright[start + token, row]
            else:
                for row in range(rows):
                    for token in range(start, tokens):
                        turned[row, token] = upright[token, row]
