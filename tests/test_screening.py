"""What a shortlist misses, against counting it row by row."""

import torch

from model_executors.heads.head_plan import GROUP
from vllm_ext.heads.screening import NUCLEI, misses


def test_counts_rows_that_miss_some():
    chosen = torch.Generator().manual_seed(0)
    states, weight = torch.randn(64, GROUP, generator=chosen), torch.randn(300, GROUP, generator=chosen)
    exact = states @ weight.T
    approximate = exact + 4 * torch.randn(exact.shape, generator=chosen)
    found = misses(approximate, states, weight, 40)
    assert list(found.tops) == [1, 10]  # four are listed for each of top_k
    greedy, tops, nuclei = 0, dict.fromkeys(found.tops, 0), dict.fromkeys(NUCLEI, 0)
    for row, guess in zip(exact, approximate, strict=True):
        listed = set(guess.topk(40).indices.tolist())
        order = row.argsort(descending=True).tolist()
        greedy += order[0] not in listed
        for k in tops:
            tops[k] += not listed.issuperset(order[:k])
        for p in nuclei:
            mass, nucleus = 0.0, []
            while mass < p:
                nucleus.append(order[len(nucleus)])
                mass += row.softmax(0)[nucleus[-1]].item()
            nuclei[p] += not listed.issuperset(nucleus)
    assert 0 < greedy < 64
    assert (found.greedy, found.tops, found.nuclei) == (greedy, tops, nuclei)


def test_nothing_is_missed_where_all_are_listed():
    states, weight = torch.randn(3, GROUP), torch.randn(20, GROUP)
    found = misses(torch.randn(3, 20), states, weight, 20)
    assert (found.greedy, *found.tops.values(), *found.nuclei.values()) == (0,) * (1 + len(found.tops) + len(NUCLEI))
