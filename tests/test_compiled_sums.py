"""The compiled sums beside torch's, in a process of their own: where numba is imported, vLLM starts no engine."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from model_executors.heads.character_head import Spelling, slots_of
from model_executors.heads.head_plan import HeadShape
from tests.character_heads import PLACES, random_spellings

BLOCK = 64
"""Tokens that are summed together."""


def both(tokens, rows):
    """Torch's sums and the compiled ones of random log-probabilities, and whether numba was imported for the first."""
    spellings, slots = slots_of(random_spellings(tokens), PLACES)
    spelling = Spelling(spellings, HeadShape(8, tokens, slots))
    places = torch.randn(rows, sum(slots), generator=torch.Generator().manual_seed(tokens))
    plain = spelling.sums(places)
    before = "numba" in sys.modules
    spelling.compile_sums()
    return plain.numpy(), spelling.sums(places).numpy(), before


@pytest.fixture(scope="module")
def elsewhere():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 65])
@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 300])
def test_equal_to_the_bit(elsewhere, tokens, rows):
    plain, compiled, _ = elsewhere.submit(both, tokens, rows).result()
    assert compiled.dtype == np.float32
    assert np.array_equal(compiled, plain)


def test_numba_is_not_imported_before_it_is_asked_for():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert not pool.submit(both, 5, 1).result()[2]
