"""Combinations that would be served wrongly are refused while vLLM is configured, before any weight is read."""

import pytest
from vllm import EngineArgs

from tests.engines import engine
from vllm_ext.checkpoint import Checkpoint


def configure(folder, skip, **settings):
    checkpoint = Checkpoint.open(str(folder), weights=False)
    overrides = checkpoint.overrides(checkpoint.planned(skip)) | settings.pop("hf_overrides", {})
    return EngineArgs(
        str(folder), dtype="float32", max_model_len=256, skip_tokenizer_init=True, hf_overrides=overrides, **settings
    ).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_lora": True}, "--enable-lora: layers 4-5 run on sampled positions only"),
        ({"runner": "pooling"}, "--runner pooling: layers 4-5 run on sampled positions only"),
        ({"cpu_offload_gb": 1}, "weight offloading does not work with an attention plan"),
        ({"hf_overrides": {"vllm_ext": {"attention_plan": ["full"] * 5}}}, "for 5 layers but the model has 6"),
        ({"hf_overrides": {"vllm_ext": {"attention_plan": ["skip"] * 6}}}, "skips all 6 layers"),
        ({"hf_overrides": {"vllm_ext": {}}}, "attention_plan is None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses(tiny_models, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(tiny_models("Llama"), [4, 5], **settings)


def test_refuses_speculation_that_reads_hidden_states(tiny_models):
    speculation = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    with pytest.raises(ValueError, match="speculative method 'extract_hidden_states': layers 4-5 run on sampled"):
        configure(tiny_models("Llama"), [4, 5], speculative_config=speculation)


def test_refuses_a_pipeline_rank_without_attention(tiny_models):
    with pytest.raises(ValueError, match="rank 1 has layers 3-5, all of them skipped"):
        configure(tiny_models("Llama"), [3, 4, 5], pipeline_parallel_size=2)


@pytest.mark.parametrize("settings", [{"enable_lora": True}, {"runner": "pooling"}], ids=["lora", "pooling"])
def test_allows_what_needs_all_positions_where_there_is_no_tail(tiny_models, settings):
    assert configure(tiny_models("Llama"), [1, 3], **settings)


def test_the_engine_refuses_too(tiny_models):
    """Whatever way vLLM is started, the same check is on its road."""
    with pytest.raises(ValueError, match="--enable-lora"), engine(tiny_models("Llama"), [5], enable_lora=True):
        pass
