"""A step's operations against those that torch counts in plain transformers, token by token; bytes written out."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import family_of
from model_executors.heads.head_plan import HeadPlan
from tests.tiny import NUM_LAYERS
from vllm_ext.bench.machine import Machine
from vllm_ext.bench.work import Work
from vllm_ext.costs import Part, Shape, Step, parts

TOKENS = 23
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, VOCAB = 4, 2, 32, 128, 256
FREEZE, SKIP = LayerPlan("freeze"), LayerPlan("skip")
LINEAR = LayerPlan("skip", consolidation="linear")


def shape_of(folder, family):
    return Shape.of(AutoConfig.from_pretrained(folder), family_of(f"{family}ForCausalLM"))


@pytest.fixture(scope="module")
def counted(tiny_models):
    """For each token of a prompt, what torch counts in each module of plain Llama, with one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models("Llama"), attn_implementation="eager")
    cache, counts = DynamicCache(), []
    for token in range(TOKENS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.tensor([[token + 3]]), past_key_values=cache)
        flops = {name: Counter(values) for name, values in counter.get_flop_counts().items()}
        counts.append({name: values.total() for name, values in flops.items()})
    return counts


def flops(found):
    return sum(part.flops for part in found)


def total(counted, tokens, *modules):
    return sum(counted[token].get(f"LlamaForCausalLM.{module}", 0) for token in tokens for module in modules)


ALL, LAST = range(TOKENS), [TOKENS - 1]
PROMPT = [Step(TOKENS, 0, prompt=True)]


def layers(*numbers, part=""):
    return [f"model.layers.{number}{part}" for number in numbers]


def test_stock_prefill(tiny_models, counted):
    ideal = parts(shape_of(tiny_models("Llama"), "Llama"), AttentionPlan.of(NUM_LAYERS), HeadPlan(), PROMPT)
    assert flops(ideal) == total(counted, ALL, *layers(*range(6))) + total(counted, LAST, "lm_head") > 0


def test_skipped_below_and_in_the_tail(tiny_models, counted):
    plan = AttentionPlan.of(NUM_LAYERS, {1: SKIP, 4: SKIP, 5: LINEAR})
    ideal = parts(shape_of(tiny_models("Llama"), "Llama"), plan, HeadPlan(), PROMPT)
    below = total(counted, ALL, *layers(0, 2, 3), "model.layers.1.mlp")
    tail = total(counted, LAST, *layers(4, 5, part=".mlp"), "lm_head") + 2 * HIDDEN * (HIDDEN + 1)
    assert flops(ideal) == below + tail


def test_frozen(tiny_models, counted):
    """Above the first frozen layer prompt tokens have K and V made, and the last one passes."""
    plan = AttentionPlan.of(NUM_LAYERS, {4: FREEZE, 5: FREEZE})
    ideal = parts(shape_of(tiny_models("Llama"), "Llama"), plan, HeadPlan(), PROMPT)
    above = total(counted, range(TOKENS - 1), *layers(4, 5, part=".self_attn.k_proj"))
    above += total(counted, range(TOKENS - 1), *layers(4, 5, part=".self_attn.v_proj"))
    below = total(counted, ALL, *layers(0, 1, 2, 3))
    assert flops(ideal) == below + above + total(counted, LAST, *layers(4, 5), "lm_head")


def test_windows(tiny_models, counted):
    """What lies between a sink of 2 and a window of 3 is not looked at."""
    plan = AttentionPlan.of(NUM_LAYERS, {3: LayerPlan("window", 3, 2)})
    ideal = parts(shape_of(tiny_models("Llama"), "Llama"), plan, HeadPlan(), PROMPT)
    beyond = sum(max(0, token + 1 - 5) for token in ALL)
    stock = total(counted, ALL, *layers(*range(6))) + total(counted, LAST, "lm_head")
    assert flops(ideal) == stock - 4 * beyond * HEADS * HEAD_SIZE


def test_decode_moves_weights_once_and_each_stream_s_cache(tiny_models):
    shape = shape_of(tiny_models("Llama"), "Llama")
    model = AutoModelForCausalLM.from_pretrained(tiny_models("Llama"))
    weights = sum(each.numel() for each in model.parameters() if each.dim() > 1) - VOCAB * HIDDEN  # none embedded
    plan = AttentionPlan.of(NUM_LAYERS, {3: LayerPlan("window", 16, 4), 5: FREEZE})
    steps = [Step(1, 99, False), Step(1, 9, False)]
    one = 2 * KV_HEADS * HEAD_SIZE
    read = one * (5 * (100 + 10) + 20 + 10)
    assert sum(part.bytes for part in parts(shape, plan, HeadPlan(), steps)) == 2 * (weights + read)


def test_a_model_s_own_windows(tiny_models):
    shape = shape_of(tiny_models("Gemma3"), "Gemma3")
    assert shape.windows == (16, None) * 3
    assert shape.kv_tokens(AttentionPlan.of(NUM_LAYERS, {1: SKIP}), 100) == 3 * 16 + 2 * 100


def test_a_part_takes_the_longer_of_its_two():
    machine = Machine(flops=10, bandwidth=100)
    assert machine.seconds([Part("a", 20, 100), Part("b", 1, 400)]) == 2 + 4


def test_heads(tiny_models):
    shape = shape_of(tiny_models("Llama"), "Llama")
    plan = AttentionPlan.of(NUM_LAYERS)
    steps = Work.parse("decode:1x8").steps

    def head_bytes(head, steps=steps):
        return parts(shape, plan, head, steps)[-1].bytes

    stock = VOCAB * HIDDEN * 2
    assert head_bytes(HeadPlan()) == stock
    screened = HeadPlan("screened", shortlist=16)
    assert head_bytes(screened) == VOCAB * HIDDEN // 2 + VOCAB * (HIDDEN // 32) * 4 + 16 * HIDDEN * 2
    assert head_bytes(screened, steps * 5) == stock
