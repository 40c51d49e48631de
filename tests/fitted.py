"""Planned checkpoints with random tensors where fitted ones would be, so that a wrong use of them shows."""

from collections.abc import Mapping
from pathlib import Path

import torch

from model_executors.attention_plan import LayerPlan, tensor_name
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.planned_checkpoint import Fit, write_planned


def write_random(stock: Path, out: Path, changes: Mapping[int, LayerPlan]) -> Path:
    """Write the plan over the checkpoint `stock`; the same tensors every time."""
    source = Checkpoint.open(str(stock), weights=True)
    config = source.config
    hidden = config["hidden_size"]
    chosen = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=chosen) * scale

    tensors = {}
    for layer, plan in changes.items():
        made = {}
        if plan.consolidation != "none":
            made["bias"] = random(hidden, scale=0.5)
        if plan.consolidation == "linear" and plan.rank is None:
            made["weight"] = random(hidden, hidden, scale=0.1)
        elif plan.consolidation == "linear":
            made |= {"down": random(plan.rank, hidden, scale=0.1), "up": random(hidden, plan.rank, scale=0.3)}
        tensors |= {tensor_name(layer, name): tensor for name, tensor in made.items()}
    write_planned(source, source.planned(changes), out, Fit(tensors, {"text": "random"}) if tensors else None)
    return out
