"""The bytes on `/metrics` are those of the engine."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from model_executors.attention_plan import AttentionPlan
from model_executors.families import family_of
from tests.engines import engine, runner
from tests.tiny import CONFIGS, NUM_LAYERS
from vllm_ext.footprint import count_parameters, kv_token_bytes


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_the_parameters_of_the_model(tiny_models, family):
    folder = tiny_models(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = family_of(f"{family}ForCausalLM")
    dropped = sum(p.numel() for layer in (1, 5) for name in row.attention for p in
                  getattr(model.model.layers[layer], name).parameters())  # fmt: skip
    counted = count_parameters(AutoConfig.from_pretrained(folder), row, AttentionPlan.skipping([1, 5], NUM_LAYERS))
    assert counted.dropped == dropped > 0
    assert counted.held + counted.dropped == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("skip", [[], [4, 5], [1, 2, 3, 4, 5]], ids=len)
def test_kv_bytes_are_those_that_vllm_allocates(tiny_models, skip):
    with engine(tiny_models("Llama"), skip) as llm:
        groups = runner(llm).kv_cache_config.kv_cache_groups
        allocated = sum(
            group.kv_cache_spec.page_size_bytes * len(group.layer_names) // group.kv_cache_spec.block_size
            for group in groups
        )
    assert kv_token_bytes(AttentionPlan.skipping(skip, NUM_LAYERS), 2, 32, 4) == allocated
