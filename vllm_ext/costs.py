"""What a plan holds in memory and what it leaves out, worked out from the model's configuration alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from model_executors.attention_plan import AttentionPlan
from model_executors.families import Family

BLOCK_SIZE = 16
"""Tokens of a KV block: vLLM's default on GPUs. Larger ones save somewhat less."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: the checkpoint's that are held, those of the skipped attentions, and the fitted ones."""

    held: int
    dropped: int
    fitted: int


def count_parameters(hf_config: Any, family: Family, plan: AttentionPlan) -> Parameters:
    """Count the parameters of the Hugging Face model of that configuration, without making them; tied ones once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    skipped = set(plan.skipped)
    held = dropped = 0
    for name, parameter in model.named_parameters():
        if family.drops(name, skipped):
            dropped += parameter.numel()
        else:
            held += parameter.numel()
    return Parameters(held, dropped, fitted_parameters(hf_config.hidden_size, plan))


def fitted_parameters(hidden_size: int, plan: AttentionPlan) -> int:
    """Parameters of the consolidations; a window's two constants are too few to count."""
    count = 0
    for layer in plan.layers:
        if layer.consolidation != "none":
            count += hidden_size
        if layer.consolidation == "linear":
            count += hidden_size * hidden_size if layer.rank is None else 2 * hidden_size * layer.rank
    return count


@dataclass(frozen=True)
class KvBytes:
    """Bytes of K and V over all layers and ranks."""

    token: int
    """For each token of the context, in the layers that hold every token."""
    window: int
    """For each request with a long context, in the layers that hold a window of it."""


def kv_bytes(plan: AttentionPlan, num_kv_heads: int, head_size: int, element_bytes: int) -> KvBytes:
    """What the KV cache holds under the plan; vLLM rounds up to whole blocks."""
    one = 2 * num_kv_heads * head_size * element_bytes
    attending = [plan.layers[layer] for layer in plan.attending]
    growing = sum(layer.window is None for layer in attending)
    return KvBytes(growing * one, sum(layer.window or 0 for layer in attending) * one)


def saved_kv(hf_config: Any, plan: AttentionPlan, context: int) -> float:
    """The part of the KV-cache bytes of a request of `context` tokens that the plan saves; below 0 if it takes more."""
    own = [own_window(hf_config, layer) for layer in range(len(plan.layers))]
    ours = [plan.layers[layer].window or own[layer] for layer in plan.attending]
    return 1 - kv_blocks(ours, context) / kv_blocks(own, context)


def kv_blocks(windows: Sequence[int | None], context: int) -> int:
    """Blocks of one layer each that vLLM keeps for a request of `context` tokens that it decodes.

    `windows` has each attending layer's. Layers of one kind share their blocks in groups, and all groups have as many
    layers: as many as the kind of which there are fewest, or those of which there are most where these are less than
    1.5 times as many. What a group lacks is left empty, so that 15 windows of 30 layers take less than 16.
    """
    kinds = Counter(windows)
    fewest, most = min(kinds.values(), default=0), max(kinds.values(), default=0)
    size = most if most < 1.5 * fewest else fewest
    full = ceil(context / BLOCK_SIZE)
    blocks = 0
    for window, count in kinds.items():
        # A window may not begin with a block.
        each = full if window is None else min(full, ceil(window / BLOCK_SIZE) + 1)
        blocks += ceil(count / size) * size * each
    return blocks


def own_window(hf_config: Any, layer: int) -> int | None:
    """The sliding window that the model itself gives the layer."""
    kinds = getattr(hf_config, "layer_types", None)
    sliding: int | None = getattr(hf_config, "sliding_window", None)
    return sliding if kinds is None or kinds[layer] == "sliding_attention" else None


def prefill_flops(hf_config: Any, family: Family, plan: AttentionPlan, tokens: int) -> int:
    """Floating-point operations of a prompt of `tokens` in all layers, but for norms and the prompt's last token above.

    Of experts those that a token is given to are counted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    heads, (kv_heads, head_size) = hf_config.num_attention_heads, kv_shape(hf_config)
    hidden_size = hf_config.hidden_size
    flops = 0
    for number, (layer, each) in enumerate(zip(model.model.layers, plan.layers, strict=True)):
        if number >= plan.first_partial:
            if each.kind == "freeze":
                flops += 2 * tokens * hidden_size * 2 * kv_heads * head_size
            continue
        attention = sum(weight.numel() for weight in getattr(layer, family.attention).parameters())
        flops += 2 * tokens * (sum(map(active_weights(hf_config), layer.named_parameters())) - attention)
        if each.kind == "skip":
            flops += 2 * tokens * fitted_parameters(hidden_size, AttentionPlan.of(2, {1: each}))
            continue
        window = min(each.window or tokens, tokens)
        looks = window * (window + 1) // 2 + (tokens - window) * window  # pairs of a query and a key
        flops += 2 * tokens * attention + 4 * looks * heads * head_size
    return flops


def active_weights(hf_config: Any) -> Any:
    """How many of a named parameter's weights a token meets."""
    chosen = [getattr(hf_config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk")]
    experts = [
        getattr(hf_config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    ]
    part = next(filter(None, chosen), 1) / next(filter(None, experts), 1)
    return lambda named: int(named[1].numel() * (part if ".experts." in f".{named[0]}" else 1))


def kv_shape(hf_config: Any) -> tuple[int, int]:
    """K and V heads, and the size of each."""
    heads = hf_config.num_attention_heads
    head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    return getattr(hf_config, "num_key_value_heads", None) or heads, head_size
