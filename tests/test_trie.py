"""The walk along the trie and the transposition, against the plain versions; at the edges of a tile and of a part."""

import numpy as np
import pytest
import torch

from model_executors import trie
from model_executors.trie import TILE, TILES_AT_ONCE, Trie, transposed

PART = TILE * TILES_AT_ONCE


@pytest.fixture(params=[False, True], ids=["one_thread", "all_threads"])
def pool(request, monkeypatch):
    monkeypatch.setattr(trie, "ONE_POOL", request.param)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("tokens", [1, TILE - 1, TILE, TILE + 1, PART, PART + 1])
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_transposes(tokens, rows):
    upright = torch.randn(tokens, rows)
    assert torch.equal(transposed(upright), upright.T)


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    "spellings",
    [
        [[0]],
        [[0, -1], [0, 1]],  # one ends where another goes on
        [[0, 2, 3], [0, 2, 4], [1, 2, 3], [1, -1, -1]],
        [[0, 1], [0, 1]],  # the same one twice
    ],
)
def test_adds_each_token_s_slots_in_their_order(spellings):
    slots = np.array(spellings)
    rows = torch.randn(3, int(slots.max()) + 1)
    plain = [[sum(row[slot] for slot in token if slot >= 0) for token in spellings] for row in rows]
    assert torch.equal(Trie.of(slots).sums(rows), torch.tensor(plain))


def test_what_tokens_begin_with_is_one_node():
    """Beside the root: 0, 0-1, 2; a token's last slot is none."""
    assert len(Trie.of(np.array([[0, 1, 3], [0, 1, 4], [0, 5, -1], [2, 1, -1]])).parents) == 1 + 3
