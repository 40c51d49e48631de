"""The ways vLLM is run: each gives the tokens of the plain in-order engine."""

import pytest

from tests.answers import Answer, assert_same
from tests.engines import NEW_TOKENS, answers, engine, outputs
from tests.reference import Reference
from tests.tiny import PROMPT_LENGTHS, prompts

SKIP = [2, 4, 5]  # one below the last attending layer, and a tail


@pytest.fixture(scope="module")
def expected(tiny_models) -> list[Answer]:
    reference = Reference(tiny_models("Llama"), SKIP)
    return [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()]


def tokens(given: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in given]


@pytest.mark.parametrize("caching", [True, False], ids=["on", "off"])
def test_prefix_caching(tiny_models, expected, caching):
    with engine(tiny_models("Llama"), SKIP, enable_prefix_caching=caching) as llm:
        first, again = (outputs(llm, prompts(), NEW_TOKENS, prompt_logprobs=False) for _ in range(2))
    assert [list(output.outputs[0].token_ids) for output in first] == tokens(expected)
    assert [list(output.outputs[0].token_ids) for output in again] == tokens(expected)
    # Whole blocks of 128 tokens are found again, but for the last token, which is always computed.
    cached = [(length - 1) // 128 * 128 if caching else 0 for length in PROMPT_LENGTHS]
    assert [output.num_cached_tokens for output in again] == cached


@pytest.mark.parametrize("budget", [16, 129])
def test_chunked_prefill(tiny_models, expected, budget):
    """Prompts are prefilled in pieces: of 16 tokens, or one more than a block."""
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with engine(tiny_models("Llama"), SKIP, **settings) as llm:
        assert_same(answers(llm, prompts()), expected)


def test_ngram_speculation(tiny_models, monkeypatch):
    """Prompts that repeat themselves, so that drafts are made, some of them wrong.

    In a process of its own: the proposer imports numba, and on CPU vLLM 0.32 cannot start another engine beside that.
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    repeating = [prompt * 6 for prompt in prompts((3, 7, 11))]
    reference = Reference(tiny_models("Llama"), SKIP)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(tiny_models("Llama"), SKIP, speculative_config=speculation) as llm:
        given = answers(llm, repeating, max_tokens=24, prompt_logprobs=False)
    assert tokens(given) == [reference.answer(prompt, 24).tokens for prompt in repeating]


def test_tensor_parallel(tiny_models, expected, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(tiny_models("Llama"), SKIP, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert_same(answers(llm, prompts()), expected)


def test_pipeline_parallel(tiny_models, expected, monkeypatch):
    """Compiled: on CPU, vLLM 0.32 allocates what passes between ranks only when it warms up a compiled model."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    with engine(tiny_models("Llama"), SKIP, **settings) as llm:
        assert_same(answers(llm, prompts()), expected)


def test_one_sequence_at_a_time(tiny_models, expected):
    """The tail is compiled on a single row, and then sees a whole prompt's."""
    with engine(tiny_models("Llama"), SKIP, enforce_eager=False, max_num_seqs=1) as llm:
        assert_same(answers(llm, prompts()), expected)
