"""What a plan holds in memory and what it leaves out, worked out from the model's configuration alone."""

from dataclasses import dataclass
from typing import Any

from model_executors.attention_plan import AttentionPlan
from model_executors.families import Family


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: those that are held, and those of the skipped attentions."""

    held: int
    dropped: int


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
    return Parameters(held, dropped)


def kv_token_bytes(plan: AttentionPlan, num_kv_heads: int, head_size: int, element_bytes: int) -> int:
    """Bytes of K and V that a token takes in all attending layers together, over all ranks."""
    return 2 * len(plan.attending) * num_kv_heads * head_size * element_bytes
