"""The bytes on `/metrics` are those of the engine."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import family_of
from tests.engines import engine, runner, skipping
from tests.tiny import CONFIGS, NUM_LAYERS
from vllm_ext.footprint import KvBytes, count_parameters, kv_bytes


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_the_parameters_of_the_model(tiny_models, family):
    folder = tiny_models(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = family_of(f"{family}ForCausalLM")
    attentions = [getattr(model.model.layers[layer], row.attention) for layer in (1, 5)]
    dropped = sum(parameter.numel() for attention in attentions for parameter in attention.parameters())
    hidden_size = model.config.hidden_size
    changes = {1: LayerPlan("skip", consolidation="linear"), 5: LayerPlan("skip", consolidation="linear", rank=8)}
    counted = count_parameters(AutoConfig.from_pretrained(folder), row, AttentionPlan.of(NUM_LAYERS, changes))
    assert counted.dropped == dropped > 0
    assert counted.fitted == hidden_size * (hidden_size + 1) + hidden_size * (2 * 8 + 1)
    assert counted.held + counted.dropped == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("skip", [[], [4, 5], [1, 2, 3, 4, 5]], ids=len)
def test_kv_bytes_are_those_that_vllm_allocates(tiny_models, skip):
    with engine(tiny_models("Llama"), skipping(skip)) as llm:
        groups = runner(llm).kv_cache_config.kv_cache_groups
        allocated = sum(
            group.kv_cache_spec.page_size_bytes * len(group.layer_names) // group.kv_cache_spec.block_size
            for group in groups
        )
    assert kv_bytes(AttentionPlan.of(NUM_LAYERS, skipping(skip)), 2, 32, 4) == KvBytes(allocated, 0)


def test_a_window_holds_its_tokens_once_a_request():
    plan = AttentionPlan.of(6, {4: LayerPlan("window", 100), 5: LayerPlan("skip")})
    assert kv_bytes(plan, 2, 32, 4) == KvBytes(token=4 * 2 * 2 * 32 * 4, window=100 * 2 * 2 * 32 * 4)
