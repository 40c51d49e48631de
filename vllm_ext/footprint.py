"""What a plan holds in memory and what it leaves out, worked out from the model's configuration alone."""

from dataclasses import dataclass
from typing import Any

from model_executors.attention_plan import AttentionPlan
from model_executors.families import Family


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
    return Parameters(held, dropped, _fitted(hf_config.hidden_size, plan))


def _fitted(hidden_size: int, plan: AttentionPlan) -> int:
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
