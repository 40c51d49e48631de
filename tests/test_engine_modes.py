"""The ways vLLM is run: each gives the tokens of the plain in-order engine, for a plan of every kind."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import vllm._custom_ops  # noqa: F401 -- registers vLLM's own operations
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from model_executors.attention_plan import LayerPlan
from tests.answers import Answer, assert_same
from tests.engines import NEW_TOKENS, answers, engine, outputs, skipping
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import PROMPT_LENGTHS, prompts
from tests.variants import write_adapter, write_quantized

# Skipped layers below the last attending one and in a tail, beside windows; and frozen layers with all of these.
PLANS = {
    "skip and window": {
        1: LayerPlan("window", 16),
        2: LayerPlan("skip"),
        4: LayerPlan("skip", consolidation="linear"),
        5: LayerPlan("skip", consolidation="linear", rank=8),
    },
    "freeze": {
        1: LayerPlan("window", 16),
        2: LayerPlan("skip", consolidation="bias"),
        3: LayerPlan("freeze"),
        4: LayerPlan("freeze", 20),
        5: LayerPlan("skip", consolidation="linear"),
    },
}


FREEZE = LayerPlan("freeze")
SKIP_BOTH_ENDS = skipping([1, 4, 5])
FREEZE_AND_SKIP = {1: LayerPlan("skip"), 3: FREEZE, 4: FREEZE, 5: LayerPlan("skip")}


@dataclass(frozen=True)
class Planned:
    """A planned checkpoint and what it should answer."""

    folder: Path
    reference: Reference
    expected: list[Answer]
    prompt_logprobs: bool

    def check(self, llm) -> None:
        """The engine answers as it should, log-probabilities included."""
        given = answers(llm, prompts(), prompt_logprobs=self.prompt_logprobs)
        assert_same(given, self.expected, prompt_logprobs=self.prompt_logprobs)


@pytest.fixture(scope="module", params=PLANS)
def planned(request, tiny_models, tmp_path_factory) -> Planned:
    changes = PLANS[request.param]
    folder = write_random(tiny_models("Llama"), tmp_path_factory.mktemp("modes") / "planned", changes)
    reference = Reference(folder, changes)
    expected = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()]
    return Planned(folder, reference, expected, prompt_logprobs=request.param != "freeze")


def mostly(name: str):
    """Both plans, of which every commit runs `name`: these engines take half a minute each."""
    plans = [each if each == name else pytest.param(each, marks=pytest.mark.nightly) for each in PLANS]
    return pytest.mark.parametrize("planned", plans, indirect=True)


def tokens(given: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in given]


def test_prefix_caching_and_aborts(planned):
    """Requests that are taken back in the middle leave nothing behind that changes another's answer, and blocks that
    are found again hold what they should.
    """
    sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    with engine(planned.folder) as llm:
        for number, prompt in enumerate(prompts((15, 129, 200), seed=1)):
            llm.llm_engine.add_request(f"aborted {number}", {"prompt_token_ids": prompt}, sampling)
        for _ in range(5):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"aborted {number}" for number in range(3)])
        first, again = (outputs(llm, prompts(), NEW_TOKENS, prompt_logprobs=False) for _ in range(2))
    assert [list(output.outputs[0].token_ids) for output in first] == tokens(planned.expected)
    assert [list(output.outputs[0].token_ids) for output in again] == tokens(planned.expected)
    # Whole blocks of 128 tokens are found again, but for the last token, which is always computed.
    assert [output.num_cached_tokens for output in again] == [(length - 1) // 128 * 128 for length in PROMPT_LENGTHS]


def test_no_prefix_caching(planned):
    with engine(planned.folder, enable_prefix_caching=False) as llm:
        planned.check(llm)


@pytest.mark.parametrize("budget", [16, 129])
def test_chunked_prefill(planned, budget):
    """Prompts are prefilled in pieces: of 16 tokens, or one more than a block."""
    settings = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "enable_chunked_prefill": True}
    with engine(planned.folder, **settings) as llm:
        planned.check(llm)


def test_preemption(planned):
    """A KV cache too small for the load: some requests are computed anew, prompt and generated tokens."""
    asked = prompts((120, 121, 122, 123))
    expected = [planned.reference.answer(prompt, 40).tokens for prompt in asked]
    settings = {"enable_prefix_caching": False, "disable_log_stats": False, "num_gpu_blocks_override": 13}
    with engine(planned.folder, **settings) as llm:
        given = answers(llm, asked, max_tokens=40, prompt_logprobs=False)
        (preempted,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preempted > 0
    assert tokens(given) == expected


@pytest.mark.parametrize("changes", [skipping([28, 29]), dict.fromkeys(range(25, 30), FREEZE)], ids=["skip", "freeze"])
def test_structured_output(smollm2, changes):
    """The real model, since this needs a tokenizer: it is held to a pattern that it would not follow by itself."""
    pattern = StructuredOutputsParams(regex=r"\d{3}-\d{3}")
    sampling = SamplingParams(temperature=0, max_tokens=16, structured_outputs=pattern)
    with engine(smollm2, changes, dtype="bfloat16", skip_tokenizer_init=False) as llm:
        (held,) = llm.generate("The capital of France is", sampling, use_tqdm=False)
        (free,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert re.fullmatch(r"\d{3}-\d{3}", held.outputs[0].text)
    assert not free.outputs[0].text.strip()[0].isdigit()


@pytest.mark.parametrize("changes", [SKIP_BOTH_ENDS, FREEZE_AND_SKIP], ids=["skip", "freeze"])
def test_quantized_weights(tiny_models, tmp_path, changes):
    """INT4 weights, bfloat16 activations, against the same weights written out in float32."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("stock vLLM has no INT4 product for this CPU: on x86 it takes AVX-512")
    write_quantized(tiny_models("Llama"), tmp_path / "quantized", tmp_path / "plain")
    reference = Reference(tmp_path / "plain", changes)
    expected = [reference.answer(prompt, 1) for prompt in prompts()]
    with engine(tmp_path / "quantized", changes, dtype="bfloat16") as llm:
        given = answers(llm, prompts(), 1, prompt_logprobs=False)
    assert_same(given, expected, tolerance=0.2, prompt_logprobs=False)


@pytest.mark.parametrize(("changes", "ranks"), [(SKIP_BOTH_ENDS, 1), (FREEZE_AND_SKIP, 2)], ids=["skip", "freeze"])
def test_adapters_on_the_lower_layers(tiny_models, tmp_path, monkeypatch, changes, ranks):
    """One batch with the adapter and one without: on CPU, stock vLLM 0.32 gets a batch of both wrong."""
    stock = tiny_models("Llama")
    write_adapter(stock, tmp_path / "adapter", [0, 2], tmp_path / "merged")
    references = Reference(tmp_path / "merged", changes), Reference(stock, changes)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts()]
    settings = {"enable_lora": True, "max_lora_rank": 8}
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        settings |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    with engine(stock, changes, **settings) as llm:
        given = [
            [list(output.outputs[0].token_ids) for output in llm.generate(asked, sampling, lora_request=adapter)]
            for adapter in (LoRARequest("lower", 1, str(tmp_path / "adapter")), None)
        ]
    adapted, plain = (
        tokens([reference.answer(prompt, NEW_TOKENS) for prompt in prompts()]) for reference in references
    )
    assert given == [adapted, plain]
    assert adapted != plain


def test_refuses_adapters_on_layers_that_do_not_run_for_every_position(tiny_models, tmp_path):
    write_adapter(tiny_models("Llama"), tmp_path / "adapter", [0, 4])
    adapter = LoRARequest("upper", 1, str(tmp_path / "adapter"))
    with (
        engine(tiny_models("Llama"), skipping([4, 5]), enable_lora=True, max_lora_rank=8) as llm,
        pytest.raises(ValueError, match=r"changes model\.layers\.4\..*only layers 0-3 can have adapters"),
    ):
        llm.llm_engine.add_lora(adapter)


@mostly("freeze")
def test_ngram_speculation(planned, monkeypatch):
    """Prompts that repeat themselves, so that drafts are made, some of them wrong.

    In a process of its own: the proposer imports numba, and on CPU vLLM 0.32 cannot start another engine beside that.
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    repeating = [prompt * 6 for prompt in prompts((3, 7, 11))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(planned.folder, speculative_config=speculation) as llm:
        given = answers(llm, repeating, max_tokens=24, prompt_logprobs=False)
    assert tokens(given) == [planned.reference.answer(prompt, 24).tokens for prompt in repeating]


@mostly("skip and window")
def test_tensor_parallel(planned, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(planned.folder, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        planned.check(llm)


@mostly("freeze")
def test_pipeline_parallel(planned, monkeypatch):
    """Compiled: on CPU, vLLM 0.32 allocates what passes between ranks only when it warms up a compiled model."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    with engine(planned.folder, **settings) as llm:
        planned.check(llm)


@mostly("freeze")
def test_compiled_for_one_sequence_at_a_time(planned):
    """The upper layers are compiled on a single row, and then see a whole prompt's."""
    with engine(planned.folder, enforce_eager=False, max_num_seqs=1) as llm:
        planned.check(llm)
