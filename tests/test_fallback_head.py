"""Character heads in the real engine, beside every kind of layer and in every way it is run."""

import re
from functools import cache

import pytest
import torch
from vllm import SamplingParams

from model_executors.attention_plan import LayerPlan
from tests.answers import assert_same
from tests.character_heads import CharacterReference, write_with_heads
from tests.engines import NEW_TOKENS, answers, engine
from tests.reference import Reference
from tests.tiny import prompts
from vllm_ext.checkpoint import Checkpoint

LENGTHS = (1, 16, 17, 129)
PLANS = {
    "full": {},
    "tail": {2: LayerPlan("window", 16), 4: LayerPlan("skip"), 5: LayerPlan("skip", consolidation="linear")},
    "freeze": {3: LayerPlan("freeze"), 4: LayerPlan("freeze"), 5: LayerPlan("skip")},
}


@pytest.fixture(scope="module")
def spelled(tiny_models, tmp_path_factory):
    """The tiny Llama with a plan, random heads and a threshold."""
    root = tmp_path_factory.mktemp("spelled")

    def folder(name, threshold, kind="character"):
        out = root / f"{name}-{threshold}-{kind}"
        if not out.exists():
            write_with_heads(tiny_models("Llama"), out, PLANS[name], threshold, kind)
        return out

    return folder


@cache
def expected_of(folder, name):
    """What the plain loop answers, and how many of its last rows fell back."""
    reference = CharacterReference(folder, PLANS[name])
    found = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)]
    return found, reference.fallbacks


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_answers_as_the_plain_loop(spelled, name, threshold):
    folder = spelled(name, threshold)
    expected, fallbacks = expected_of(folder, name)
    asked = len(LENGTHS) * (NEW_TOKENS + 1)
    assert fallbacks == 0 if threshold == 0 else 0 < fallbacks < asked
    with engine(folder) as llm:
        given = answers(llm, prompts(LENGTHS), prompt_logprobs=name != "freeze")
    assert_same(given, expected, prompt_logprobs=name != "freeze")


@pytest.mark.parametrize("name", ["full", "tail"])
def test_at_a_threshold_of_one_it_is_the_stock_head(spelled, name):
    folder = spelled(name, 1.0)
    reference = Reference(folder, PLANS[name])
    with engine(folder) as llm:
        given = answers(llm, prompts(LENGTHS))
    assert_same(given, [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)])


@pytest.mark.parametrize(("name", "threshold"), [("full", 0.0), ("tail", 0.85)])
def test_exact_scores_of_the_best_spelled(spelled, name, threshold):
    """The stock head's rows decide among them; without them the answers are others."""
    folder = spelled(name, threshold, "rescored")
    expected, fallbacks = expected_of(folder, name)
    assert fallbacks == 0 if threshold == 0 else 0 < fallbacks < len(LENGTHS) * (NEW_TOKENS + 1)
    without, _ = expected_of(spelled(name, 0.3 if threshold else 0.0), name)
    assert [each.tokens for each in expected] != [each.tokens for each in without]
    with engine(folder) as llm:
        given = answers(llm, prompts(LENGTHS))
    assert_same(given, expected)


def test_compiled_for_one_sequence_at_a_time(spelled):
    expected, _ = expected_of(spelled("tail", 0.3), "tail")
    with engine(spelled("tail", 0.3), enforce_eager=False, max_num_seqs=1) as llm:
        assert_same(answers(llm, prompts(LENGTHS)), expected)


@pytest.mark.parametrize(
    ("split", "kind"),
    [
        pytest.param("tensor", "character", marks=pytest.mark.nightly),
        ("tensor", "rescored"),
        ("pipeline", "rescored"),
    ],
)
def test_on_two_ranks(spelled, monkeypatch, split, kind):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = spelled("tail", 0.3 if kind == "character" else 0.85, kind)
    expected, _ = expected_of(folder, "tail")
    settings = {f"{split}_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(folder, **settings, enforce_eager=split == "tensor") as llm:
        assert_same(answers(llm, prompts(LENGTHS)), expected)


def test_ngram_speculation(spelled, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    repeating = [prompt * 6 for prompt in prompts((3, 7, 11))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    reference = CharacterReference(spelled("tail", 0.3), PLANS["tail"])
    with engine(spelled("tail", 0.3), speculative_config=speculation) as llm:
        given = answers(llm, repeating, max_tokens=16, prompt_logprobs=False)
    assert [each.tokens for each in given] == [reference.answer(prompt, 16).tokens for prompt in repeating]


def test_the_whole_sampler_works(spelled):
    """Seeds aside, which vLLM's CPU sampler does not take: penalties, biases, allowed tokens, log-probabilities."""
    (prompt,) = prompts((16,))
    asked = [{"prompt_token_ids": prompt}]
    plain = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "detokenize": False}
    reference = CharacterReference(spelled("full", 0.0), {})
    row = reference.logprobs(prompt)[-1]
    with engine(spelled("full", 0.0)) as llm:

        def ask(**settings):
            (output,) = llm.generate(asked, SamplingParams(**plain | settings), use_tqdm=False)
            return output.outputs[0]

        allowed = ask(allowed_token_ids=[3, 50, 200])
        biased = ask(logit_bias={77: 100.0})
        ranked = ask(logprobs=5, max_tokens=1)
        free = ask(max_tokens=24)
        penalised = ask(max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0)
    assert allowed.token_ids[0] == max([3, 50, 200], key=lambda token: row[token].item())
    assert list(biased.token_ids) == [77] * 6
    best = row.topk(5)
    found = sorted((each.rank, token, each.logprob) for token, each in ranked.logprobs[0].items())
    assert [token for _, token, _ in found] == best.indices.tolist()
    assert [value for _, _, value in found] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert len(set(penalised.token_ids)) > len(set(free.token_ids))


def test_a_checkpoint_without_its_heads_is_refused(spelled, tmp_path):
    source = Checkpoint.open(str(spelled("full", 0.0)), weights=True)
    assert source.head.kind == "character"
    assert re.match(r"^\(\d+(, \d+)*\)$", str(source.head.slots))
    assert torch.Size(source.head_shapes(source.head)["vllm_ext.head.spellings"])[0] == 256
