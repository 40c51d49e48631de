"""Scores from vLLM against a plain transformers loop."""

import pytest

from model_executors.attention_plan import LayerPlan
from tests.engines import engine
from tests.reference import Reference
from tests.tiny import prompts
from vllm_ext.quality.scoring import ForceTokens, generate, score_answers, score_prompts

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
        as_answers = score_answers(llm, texts, TOKENS, progress.append)
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
