"""Injection on the real model: low down the answer follows the exchange, at the top it does not."""

import pytest
from transformers import AutoTokenizer

from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline.model import OfflineModel
from vllm_ext.probe.injection import Pairs


@pytest.fixture(scope="module")
def pairs(smollm2):
    model = OfflineModel(Checkpoint.open(str(smollm2), weights=True))
    return Pairs(model, AutoTokenizer.from_pretrained(smollm2), 8, seed=0)


def test_pairs_differ_in_the_countrys_name_alone(smollm2, pairs):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    own, _, donors = pairs.entered
    assert own.states[0].shape[1] >= donors.states[0].shape[1]
    for number, places in enumerate(pairs.positions):
        prompt = pairs.own.tokens[number, : pairs.own.prompts[number]].tolist()
        name = tokenizer.decode(prompt[min(places) : max(places) + 1])
        assert tokenizer.decode(prompt).endswith(f"What is the capital of{name}?\nA:")


def test_answers_follow_below_and_not_above(pairs):
    below, above = pairs.at(0), pairs.at(29)
    assert below.prompt == [0.0] * pairs.count
    assert below.injected == [1.0] * pairs.count
    assert sum(above.prompt) >= pairs.count - 1
    assert above.injected == [0.0] * pairs.count
