"""The spelled scores, against a plain sum over each token's symbols."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_executors.heads.character_head import PAD, CharacterHead, gathered_sums, slots_of, with_exact
from model_executors.heads.fallback_head import FallbackHead, fall_back_by_choice, fall_back_by_row
from model_executors.heads.head_metrics import HeadMetrics, _DeviceCount
from model_executors.heads.head_plan import HeadShape
from tests.character_heads import PLACES, character_logprobs, random_spellings, random_tensors, rescored_row

HIDDEN = 16


def head_of(spellings, width=0, seed=0, places=PLACES):
    """A head in float32, and its tensors."""
    found, slots = slots_of(spellings, places)
    shape = HeadShape(HIDDEN, len(spellings), slots, width)
    tensors = random_tensors(shape, found, seed)
    head = CharacterHead(shape, torch.float32)
    for name, tensor in tensors.items():
        head.get_parameter(name).data.copy_(tensor)
    head.prepare()
    return head, tensors


@pytest.mark.parametrize("width", [0, 8])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_is_the_sum_over_symbols(width, rows):
    head, tensors = head_of(random_spellings(300), width)
    states = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([character_logprobs(tensors, head.shape.slots, state) for state in states])
    torch.testing.assert_close(head(states), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head(states).exp().sum(-1), torch.ones(rows))


def test_no_rows():
    head, _ = head_of(random_spellings(20))
    assert head(torch.empty(0, HIDDEN)).shape == (0, 20)


SPELLINGS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6).map(tuple), min_size=1, max_size=30)


@settings(deadline=None)
@given(SPELLINGS, st.integers(0, 2**32))
def test_any_spellings(spellings, seed):
    """Of one symbol or six, the same ones twice, places that only one token reaches."""
    head, tensors = head_of(spellings, seed=seed, places=6)
    state = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    expected = character_logprobs(tensors, head.shape.slots, state)
    torch.testing.assert_close(head(state[None])[0], expected, atol=1e-4, rtol=1e-4)


def test_rows_do_not_change_each_other():
    """A row's scores are the same alone and among others, to the bit, so that ties are settled alike."""
    head, _ = head_of(random_spellings(300))
    places = head.spelling.log_probabilities(torch.randn(40, sum(head.shape.slots)))
    together = head.spelling.sums(places)
    for row in range(40):
        assert torch.equal(head.spelling.sums(places[row : row + 1])[0], together[row])


def test_equal_spellings_tie_and_the_first_token_wins():
    head, _ = head_of([(0, 9), (1, 9), (0, 9), (1, 9)])
    scores = head(torch.randn(50, HIDDEN))
    assert torch.equal(scores[:, 0], scores[:, 2])
    assert set(scores.argmax(-1).tolist()) == {0, 1}


@pytest.mark.parametrize("shortlist", [1, 7, 39, 40])
def test_listed_tokens_share_their_probability_by_exact_scores(shortlist):
    chosen = torch.Generator().manual_seed(shortlist)
    scores, exact = (torch.randn(3, 40, generator=chosen).log_softmax(-1) for _ in range(2))
    tokens = scores.topk(shortlist, sorted=False).indices
    expected = torch.stack([rescored_row(row, its, shortlist) for row, its in zip(scores, exact, strict=True)])
    found = scores.clone()
    together = with_exact(found, tokens, exact.gather(1, tokens))
    torch.testing.assert_close(together.exp(), scores.exp().sort(descending=True).values[:, :shortlist].sum(-1))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3))
    assert all(best in listed for best, listed in zip(found.argmax(-1).tolist(), tokens.tolist(), strict=True))


def test_slots_are_numbered_place_after_place():
    found, slots = slots_of([(5, 7), (6,), (5, 8, 5)], 4)
    assert slots == (2, 2, 1)  # the fourth place is nobody's
    assert found.tolist() == [[0, 2, PAD], [1, PAD, PAD], [0, 3, 4]]


@pytest.mark.parametrize("sizes", [{"slots": ()}, {"slots": (3, 0)}, {"hidden_size": 0}, {"width": -1}])
def test_refuses_sizes(sizes):
    with pytest.raises(ValueError, match="sizes are 1 or more"):
        HeadShape(**{"hidden_size": 8, "vocab_size": 8, "slots": (3,)} | sizes)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_form_for_gpus_gives_the_same_sums(rows):
    head, _ = head_of(random_spellings(300))
    places = head.spelling.log_probabilities(torch.randn(rows, sum(head.shape.slots)))
    gathered = gathered_sums(places, head.spelling.by_place)
    torch.testing.assert_close(gathered, head.spelling.sums(places), rtol=1e-6, atol=1e-5)


def test_the_form_for_gpus_is_one_graph_whatever_the_number_of_rows():
    """Compiled with the row count unbacked, as it is on a GPU: no break, no sync, and one graph for all counts."""
    head, _ = head_of(random_spellings(300))
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(gathered_sums, dynamic=True, fullgraph=True, backend=count)
    for rows in (3, 1, 2, 64):
        places = head.spelling.log_probabilities(torch.randn(rows, sum(head.shape.slots)))
        torch._dynamo.decorators.mark_unbacked(places, 0)
        torch.testing.assert_close(compiled(places, head.spelling.by_place), head.spelling.sums(places))
    assert len(graphs) == 1


@pytest.mark.parametrize("unsure", [[0, 0, 0], [1, 0, 1], [1, 1, 1]])
def test_rows_fall_back_the_same_on_the_host_and_on_the_device(unsure):
    scores, states, weight = torch.randn(3, 20), torch.randn(3, 8), torch.randn(20, 8)
    mask = torch.tensor(unsure, dtype=torch.bool)
    ways = [
        way(scores.clone(), states, mask, lambda rows: rows @ weight.T)
        for way in (fall_back_by_row, fall_back_by_choice)
    ]
    torch.testing.assert_close(*ways)
    for row, below in enumerate(unsure):
        torch.testing.assert_close(ways[1][row], states[row] @ weight.T if below else scores[row])


def test_a_rank_that_does_not_sample_has_no_logits():
    mask = torch.tensor([True])
    for way in (fall_back_by_row, fall_back_by_choice):
        assert way(torch.zeros(1, 4), torch.zeros(1, 2), mask, lambda rows: None) is None


def test_rows_are_counted_on_the_device():
    count = _DeviceCount(torch.device("cpu"))
    masks = [torch.rand(9) < 0.5 for _ in range(5)]
    assert [count.add(mask) for mask in masks] == [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("rescored", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_on_a_gpu_the_host_waits_for_nothing(rescored, threshold):
    """On torch's meta device, which has shapes and no data: whatever would read data on the host raises there."""
    head, _ = head_of(random_spellings(50), width=8)
    served = FallbackHead.__new__(FallbackHead)
    nn.Module.__init__(served)
    served.heads, served.threshold, served.shortlist, served.metrics = (
        head.to("meta"),
        threshold,
        8,
        HeadMetrics("tiny"),
    )
    served.exact = (lambda _states, tokens: torch.empty(tokens.shape, device="meta")) if rescored else None
    states = torch.empty(3, HIDDEN, device="meta")
    scores = served(states, lambda rows: torch.empty(len(rows), 50, device="meta"))
    assert scores.shape == (3, 50)
    with pytest.raises(RuntimeError, match="meta"):  # as the way for CPUs would
        fall_back_by_row(scores, states, torch.empty(3, dtype=torch.bool, device="meta"), lambda rows: rows)
