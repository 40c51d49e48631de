"""The screened head: exact where it says so, against plain products; and in the real engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from model_executors.heads import screened_head
from model_executors.heads.screened_head import GROUP, Int4Copy, quantize, screened_scores
from model_executors.hooks.full_vocabulary import FullVocabularyRows, needs_full_vocabulary
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine, outputs, runner
from tests.reference import Reference
from tests.tiny import prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.served import Served

LENGTHS = (1, 17, 129)


def head_weight(vocab_size=512, hidden_size=2 * GROUP):
    return torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(0))


def test_the_copy_is_the_nearest_of_fifteen_steps():
    weight = head_weight()
    weight[7] = 0  # a row without a scale of its own
    numbers, scales = quantize(weight)
    for row, column in [(0, 0), (3, 31), (3, 32), (511, 63), (7, 5)]:
        group = weight[row, column // GROUP * GROUP : column // GROUP * GROUP + GROUP]
        step = (group.abs().max() / 7).bfloat16().float().item()
        nearest = min(range(-7, 8), key=lambda n: abs(n * step - weight[row, column].item()))
        assert abs(numbers[row, column].item() * step - weight[row, column].item()) == pytest.approx(
            abs(nearest * step - weight[row, column].item()), abs=1e-6
        )
    assert scales.shape == (512, 2)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_packed_product_is_that_of_the_copy(rows):
    weight, states = head_weight(), torch.randn(rows, 2 * GROUP).bfloat16()
    numbers, scales = quantize(weight)
    written_out = numbers.float() * scales.float().repeat_interleave(GROUP, 1)
    expected = states.float() @ written_out.T
    torch.testing.assert_close(Int4Copy(weight)(states), expected, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("shortlist", [1, 64, 511, 512, 513])
def test_what_is_listed_is_exact_and_above_all_else(shortlist):
    weight, states = head_weight().bfloat16(), torch.randn(3, 2 * GROUP).bfloat16()
    approximate = Int4Copy(weight)(states)
    listed = approximate.topk(min(shortlist, 512)).indices
    exact = states.float() @ weight.float().T
    scores = screened_scores(approximate.clone(), states, weight, shortlist)
    for row in range(3):
        rest = torch.ones(512, dtype=torch.bool)
        rest[listed[row]] = False
        torch.testing.assert_close(scores[row, listed[row]], exact[row, listed[row]])
        assert not rest.any() or scores[row, rest].max() <= scores[row, listed[row]].min()


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"temperature": 0}, False),
        ({"temperature": 1}, True),
        ({"temperature": 1, "top_k": 64}, False),
        ({"temperature": 1, "top_k": 65}, True),
        ({"temperature": 1, "top_p": 0.5}, True),
        ({"temperature": 1, "top_p": 0.5, "top_k": 1}, False),
        ({"temperature": 0, "logprobs": 0}, True),
        ({"temperature": 0, "prompt_logprobs": 0}, True),
        ({"temperature": 0, "presence_penalty": 0.1}, True),
        ({"temperature": 0, "frequency_penalty": -0.1}, True),
        ({"temperature": 0, "repetition_penalty": 1.1}, True),
        ({"temperature": 0, "logit_bias": {3: 1.0}}, True),
        ({"temperature": 0, "allowed_token_ids": [3]}, True),
        ({"temperature": 0, "bad_words": ["no"]}, True),
        ({"temperature": 0, "min_tokens": 2}, True),
        ({"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="a")}, True),
    ],
)
def test_which_requests_need_all_of_the_vocabulary(settings, whole):
    assert needs_full_vocabulary(SamplingParams(**settings), 256) is whole


GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=1)


@given(st.data())
def test_follows_the_batch(data):
    """Against a list of requests that is changed as vLLM changes its batch."""
    watch = FullVocabularyRows.__new__(FullVocabularyRows)
    watch.shortlist, watch.rows = 256, set()
    batch: dict[int, SamplingParams] = {}
    for _ in range(data.draw(st.integers(1, 6))):
        removed = data.draw(st.lists(st.sampled_from(sorted(batch)), unique=True)) if batch else []
        for row in removed:
            del batch[row]
        rows = data.draw(st.lists(st.integers(0, 5), unique=True))
        added = [(row, data.draw(st.sampled_from([GREEDY, SAMPLED])), None, []) for row in rows]
        batch |= {row: sampling for row, sampling, *_ in added}
        moved = []
        if len(batch) > 1 and data.draw(st.booleans()):
            source, target = data.draw(st.permutations(sorted(batch)))[:2]
            swap = data.draw(st.booleans())
            moved = [(source, target, MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL)]
            was = batch.pop(target)
            batch[target] = batch.pop(source)
            if swap:
                batch[source] = was
        watch.update_state(BatchUpdate(len(batch), removed, added, moved))
        assert watch.rows == {row for row, sampling in batch.items() if sampling is SAMPLED}


@pytest.fixture(scope="module")
def screened(tiny_models):
    """An engine of the tiny Llama with a short list, in which few of 256 tokens are exact."""
    folder = tiny_models("Llama")
    overrides = Served.open(str(folder), None, "screened").hf_overrides()
    overrides["vllm_ext"]["head"]["shortlist"] = 16
    with engine(folder, hf_overrides=overrides) as llm:
        yield llm


def test_greedy_answers_are_the_exact_heads(screened, tiny_models, monkeypatch):
    """One request at a time, which is screened, and all at once with log-probabilities, which is not."""
    reference = Reference(tiny_models("Llama"), {})
    expected = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)]
    calls = []
    original = screened_head.screened_scores
    monkeypatch.setattr(screened_head, "screened_scores", lambda *args: calls.append(len(args[1])) or original(*args))
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    for prompt, answer in zip(prompts(LENGTHS), expected, strict=True):
        (output,) = screened.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == answer.tokens
    assert calls == [1] * NEW_TOKENS * len(LENGTHS)
    assert_same(answers(screened, prompts(LENGTHS)), expected)
    assert len(calls) == NEW_TOKENS * len(LENGTHS)


def test_more_rows_than_the_kernel_is_good_for_go_to_the_stock_head(screened, tiny_models, monkeypatch):
    monkeypatch.setattr(screened_head, "screened_scores", lambda *_: pytest.fail("screened"))
    many = prompts((5,) * (screened_head.MOST_ROWS + 1))
    reference = Reference(tiny_models("Llama"), {})
    given = outputs(screened, many, 1, prompt_logprobs=False)
    assert [list(output.outputs[0].token_ids) for output in given] == [
        reference.answer(prompt, 1).tokens for prompt in many
    ]


def test_top_k_draws_from_the_exact_best(screened, tiny_models, monkeypatch):
    calls = []
    original = screened_head.screened_scores
    monkeypatch.setattr(screened_head, "screened_scores", lambda *args: calls.append(len(args[1])) or original(*args))
    (prompt,) = prompts((17,))
    row = Reference(tiny_models("Llama"), {}).logprobs(prompt)[-1]
    sampling = SamplingParams(temperature=2.0, top_k=4, max_tokens=1, ignore_eos=True, detokenize=False)
    drawn = {
        screened.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0].token_ids[0]
        for _ in range(60)
    }
    assert drawn <= set(row.topk(4).indices.tolist())
    assert calls == [1] * 60


def test_holds_a_copy_beside_the_weight(screened):
    head = runner(screened).model.lm_head
    rows, hidden = head.weight.shape
    assert head.screen.packed.numel() * head.screen.packed.element_size() == rows * hidden // 2
    assert head.screen.scales.shape == (hidden // GROUP, rows, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "with speculation vLLM does not"),
        ({"enable_lora": True, "max_lora_rank": 8}, "was made for the model without adapters"),
    ],
)
def test_refuses(tiny_models, settings, message):
    folder = tiny_models("Llama")
    overrides = Served.open(str(folder), None, "screened").hf_overrides()
    with pytest.raises(ValueError, match=message), engine(folder, hf_overrides=overrides, **settings):
        pass


def test_refuses_the_model_runner_that_does_not_tell_it_of_the_batch(tiny_models, monkeypatch):
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    test_refuses(tiny_models, {}, "set VLLM_USE_V2_MODEL_RUNNER=0")


def test_a_stock_checkpoint_is_laid_over_with_a_plan_of_all_full(tiny_models):
    overrides = Served.open(str(tiny_models("Llama")), None, "screened").hf_overrides()
    assert overrides["vllm_ext"]["head"] == {"kind": "screened"}
    assert (
        overrides["vllm_ext"]["attention_plan"]
        == ["full"] * Checkpoint.open(str(tiny_models("Llama")), weights=False).num_layers
    )
