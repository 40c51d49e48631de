"""Scores from vLLM against a plain transformers loop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from model_executors.attention_plan import LayerPlan
from tests.engines import engine
from tests.reference import Reference
from tests.tiny import prompts
from vllm_ext.quality.scoring import FORCED, ForceTokens, generate, score_answers, score_prompts
from vllm_ext.tasks.items import Item

LENGTHS = (8, 129, 200)
SETTINGS = {"logits_processors": [ForceTokens], "async_scheduling": False, "max_num_batched_tokens": 150}
TOKENS = 3
PLANS = {
    "stock": None,
    "frozen": {3: LayerPlan("freeze"), 4: LayerPlan("freeze"), 5: LayerPlan("skip")},
}


@pytest.fixture(scope="module", params=PLANS)
def scored(request, tiny_models):
    """The scores of the same texts as prompts and as answers, and the reference; prompts come in chunks here."""
    folder, changes = tiny_models("Llama"), PLANS[request.param]
    texts = prompts(LENGTHS)
    progress: list[int] = []
    with engine(folder, changes, **SETTINGS) as llm:
        as_prompts = score_prompts(llm, texts, progress.append) if changes is None else []
        items = [Item(tuple(text[:-TOKENS]), tuple(text[-TOKENS:])) for text in texts]
        as_answers = score_answers(llm, items, progress.append)
        generated = generate(llm, texts, TOKENS, progress.append)
    return texts, as_prompts, as_answers, generated, progress, Reference(folder, changes or {})


def assert_top(top, expected):
    """The top tokens, or others as likely within float32's reach."""
    assert expected[range(len(top)), top].tolist() == pytest.approx(expected.max(-1).values.tolist(), abs=2e-4)


@pytest.mark.parametrize("scored", ["stock"], indirect=True)
def test_prompts_as_in_transformers(scored):
    texts, as_prompts, _, _, _, reference = scored
    for text, ours in zip(texts, as_prompts, strict=True):
        expected = reference.logprobs(text)[:-1]
        assert ours.logprobs == pytest.approx(expected[range(len(text) - 1), text[1:]].tolist(), abs=2e-4)
        assert_top(ours.top, expected)


def test_answers_as_in_transformers(scored):
    texts, _, as_answers, _, _, reference = scored
    for text, ours in zip(texts, as_answers, strict=True):
        reference.prompt_length = len(text) - TOKENS
        expected = reference.logprobs(text)[-TOKENS - 1 : -1]
        assert ours.logprobs == pytest.approx(expected[range(TOKENS), text[-TOKENS:]].tolist(), abs=2e-4)
        assert_top(ours.top, expected)


def test_prompts_do_not_find_the_answers_scored_before(scored):
    """What was generated is cached with other K and V than a prompt has, where layers are frozen."""
    texts, _, _, generated, _, reference = scored
    for text, ours in zip(texts, generated, strict=True):
        assert ours == reference.answer(text, TOKENS).tokens


def test_progress_adds_up(scored):
    texts, as_prompts, _, _, progress, _ = scored
    tokens = sum(map(len, texts))
    assert sum(progress) == tokens * (3 if as_prompts else 2) - TOKENS * len(texts)


def test_tokens_are_forced_under_v2_too():
    """Against its interface, since none of its engines runs on a CPU: rows move, and slots are used again."""
    assert issubclass(ForceTokens, LogitsProcessorV2)
    hook = ForceTokens(None, SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([4, 2, 9]))))
    assert hook.add_request(0, SamplingParams(extra_args={FORCED: [3, 1]}))
    assert not hook.add_request(1, SamplingParams())
    assert hook.add_request(2, SamplingParams(extra_args={FORCED: [0, 2]}))

    def chosen(requests, seq_lens):
        step = SimpleNamespace(idx_mapping_np=np.array(requests), seq_lens_upper_bound_np=np.array(seq_lens))
        return hook.apply(torch.tensor([[0.0, 1, 2, 3, 9]] * len(requests)), step).argmax(-1).tolist()

    assert chosen([2, 1, 0], [5, 2, 4]) == [4, 4, 3]  # of the first a prompt is prefilled in chunks
    assert chosen([0, 2], [5, 9]) == [1, 0]
    assert not hook.add_request(0, SamplingParams())
    assert chosen([0, 2], [4, 10]) == [4, 2]
