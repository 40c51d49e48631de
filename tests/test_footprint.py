"""The bytes on `/metrics` are those of the engine."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import family_of
from tests.engines import engine, runner, skipping
from tests.tiny import CONFIGS, NUM_LAYERS
from vllm_ext.costs import BLOCK_SIZE, KvBytes, count_parameters, kv_blocks, kv_bytes, saved_kv


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


@pytest.fixture(scope="module")
def vllm_config(tiny_models):
    options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True}
    config = EngineArgs(str(tiny_models("Llama")), **options).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # as an engine settles it
    return config


@settings(deadline=None)
@given(
    windows=st.lists(st.sampled_from([None, 128, 200]), min_size=1, max_size=40),
    context=st.sampled_from([1, 16, 17, 127, 128, 129, 144, 145, 4_096]),
)
def test_blocks_are_those_of_vllm_s_groups(vllm_config, windows, context):
    common = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    specs = {
        f"layers.{layer}.attn": SlidingWindowSpec(**common, sliding_window=window)
        if window
        else FullAttentionSpec(**common)
        for layer, window in enumerate(windows)
    }
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    full = ceil(context / BLOCK_SIZE)
    blocks = 0
    for group in groups:
        spec = specs[group.layer_names[0]]
        windowed = isinstance(spec, SlidingWindowSpec)
        blocks += min(full, spec.max_admission_blocks_per_request(1, 4_096)) if windowed else full
    assert kv_blocks(windows, context) == blocks * max(len(group.layer_names) for group in groups)


def test_windows_that_leave_groups_half_empty_save_less():
    """By hand: 30 layers, 4,096 tokens in 256 blocks, windows of 128 in 9 of them."""
    assert kv_blocks([None] * 30, 4_096) == 30 * 256
    assert kv_blocks([None] * 15 + [128] * 15, 4_096) == 15 * (256 + 9)
    assert kv_blocks([None] * 14 + [128] * 16, 4_096) == 16 * (256 + 9)
    assert kv_blocks([None] * 12 + [128] * 18, 4_096) == 12 * (256 + 2 * 9)
    assert kv_blocks([128] * 30, 4_096) == 30 * 9
    assert kv_blocks([], 4_096) == 0


def test_windows_of_the_models_own_are_no_saving(tiny_models):
    config = AutoConfig.from_pretrained(tiny_models("Gemma3"))
    own = [kind == "sliding_attention" for kind in config.layer_types]
    assert saved_kv(config, AttentionPlan.of(NUM_LAYERS), 4_096) == 0
    assert any(own)
    first = own.index(True)
    assert saved_kv(config, AttentionPlan.of(NUM_LAYERS, {first: LayerPlan("skip")}), 4_096) < 1 / NUM_LAYERS
