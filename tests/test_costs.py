"""Costs beside what vLLM allocates, what transformers holds, and what is worked out by hand."""

from math import ceil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import family_of
from model_executors.hooks.kv_cache import SinkWindowSpec
from tests.engines import engine, runner, skipping
from tests.tiny import CONFIGS, NUM_LAYERS
from vllm_ext.costs import BLOCK_SIZE, KvBytes, Reach, Shape, count_parameters, kv_blocks, reaches, saved_kv


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
    held = reaches(AutoConfig.from_pretrained(tiny_models("Llama")), AttentionPlan.of(NUM_LAYERS, skipping(skip)))
    assert KvBytes.of(held.values(), 2 * 2 * 32 * 4) == KvBytes(allocated, 0)


def test_a_window_holds_its_tokens_once_a_request(tiny_models):
    plan = AttentionPlan.of(6, {4: LayerPlan("window", 100, 4), 5: LayerPlan("skip")})
    llama, gemma = (AutoConfig.from_pretrained(tiny_models(family)) for family in ("Llama", "Gemma3"))
    assert KvBytes.of(reaches(llama, plan).values(), 8) == KvBytes(token=4 * 8, window=104 * 8)
    # Gemma gives every other layer a window of 16 itself.
    assert KvBytes.of(reaches(gemma, AttentionPlan.of(6)).values(), 8) == KvBytes(token=3 * 8, window=3 * 16 * 8)


REACHES = [*map(Reach, (None, 1, 5, 12, 40)), Reach(1, 1), Reach(3, 4), Reach(9, 4)]


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize(("new", "seen"), [(1, 0), (1, 11), (7, 5), (12, 0), (20, 30)])
def test_who_sees_whom(reach, new, seen):
    """One by one: a key is seen in the sink or in the window, and counts once."""

    def sees(query, key):
        return key <= query and (reach.window is None or key < reach.sink or query - key < reach.window)

    queries, keys = range(seen, seen + new), range(seen + new)
    assert reach.pairs(new, seen) == sum(sees(query, key) for query in queries for key in keys)
    assert reach.tokens(seen + new) == sum(sees(seen + new - 1, key) for key in keys)
    read = sum(any(sees(query, key) for query in queries) for key in keys)
    assert reach.read(new, seen) == read


@pytest.fixture(scope="module")
def vllm_config(tiny_models):
    options = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True}
    config = EngineArgs(str(tiny_models("Llama")), **options).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # as an engine settles it
    return config


@settings(deadline=None)
@given(
    reaches=st.lists(
        st.sampled_from([Reach(), Reach(128), Reach(128, 4), Reach(128, 16), Reach(200, 4)]), min_size=1, max_size=40
    ),
    context=st.sampled_from([1, 16, 17, 127, 128, 129, 144, 145, 4_096]),
)
def test_blocks_are_those_of_vllm_s_groups(vllm_config, reaches, context):
    """A model's own windows have no sink; a decoded request has one token in flight."""
    # Which vLLM takes for layers of one kind, and our checks refuse (test_verify.py).
    assume(len({reach.window for reach in reaches}) > 1 or len({bool(reach.sink) for reach in reaches}) == 1)
    common = {"block_size": BLOCK_SIZE, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}

    def spec_of(reach):
        if reach.window is None:
            return FullAttentionSpec(**common)
        if not reach.sink:
            return SlidingWindowSpec(**common, sliding_window=reach.window)
        return SinkWindowSpec(**common, sliding_window=reach.window, sink=reach.sink, in_flight_tokens=1)

    specs = {f"layers.{layer}.attn": spec_of(reach) for layer, reach in enumerate(reaches)}
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    full = ceil(context / BLOCK_SIZE)
    blocks = 0
    for group in groups:
        spec = specs[group.layer_names[0]]
        windowed = isinstance(spec, SlidingWindowSpec)
        blocks += min(full, spec.max_admission_blocks_per_request(1, 4_096)) if windowed else full
    assert kv_blocks(reaches, context) == blocks * max(len(group.layer_names) for group in groups)


def test_windows_that_leave_groups_half_empty_save_less():
    """By hand: 30 layers, 4,096 tokens in 256 blocks, windows of 128 in 9 of them, and a sink in one more."""

    def blocks(full, windows, sink=0):
        return kv_blocks([Reach()] * full + [Reach(128, sink)] * windows, 4_096)

    assert blocks(30, 0) == 30 * 256
    assert blocks(15, 15) == 15 * (256 + 9)
    assert blocks(15, 15, sink=4) == 15 * (256 + 10)
    assert blocks(14, 16) == 16 * (256 + 9)
    assert blocks(12, 18) == 12 * (256 + 2 * 9)
    assert blocks(0, 30) == 30 * 9
    assert blocks(0, 0) == 0
    assert Reach(128, 4).blocks(100) == 7


def test_windows_of_the_models_own_are_no_saving(tiny_models):
    config = AutoConfig.from_pretrained(tiny_models("Gemma3"))
    own = [kind == "sliding_attention" for kind in config.layer_types]
    assert saved_kv(config, AttentionPlan.of(NUM_LAYERS), 4_096) == 0
    assert any(own)
    first = own.index(True)
    assert saved_kv(config, AttentionPlan.of(NUM_LAYERS, {first: LayerPlan("skip")}), 4_096) < 1 / NUM_LAYERS


def test_savings_of_a_long_request(tiny_models):
    """By hand: 6 layers of 2 heads of 32, hidden size 128."""
    config = AutoConfig.from_pretrained(tiny_models("Llama"))
    plan = AttentionPlan.of(6, {1: LayerPlan("window", 100, 4), 4: LayerPlan("freeze"), 5: LayerPlan("skip")})
    # 63 blocks for 4 layers, and 8 for a window and 1 for its sink, whose group of 1 makes groups of all.
    assert saved_kv(config, plan, 1_000) == pytest.approx(1 - (4 * 63 + 9) / (6 * 63))
    assert saved_kv(config, plan, 50) == pytest.approx(1 / 6)


def test_experts_count_as_far_as_a_token_meets_them(tiny_models):
    config, family = AutoConfig.from_pretrained(tiny_models("Mixtral")), family_of("MixtralForCausalLM")
    full = AttentionPlan.of(6)
    half = Shape.of(config, family).prefill_flops(full, 10)
    config.num_experts_per_tok = config.num_local_experts
    experts = 3 * 128 * 192
    assert Shape.of(config, family).prefill_flops(full, 10) - half == 6 * 2 * 10 * 2 * experts
