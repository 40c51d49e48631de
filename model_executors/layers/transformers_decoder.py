"""The same adapter over vLLM's Transformers backend, for the families that vLLM has no class of its own for.

There a decoder is the one of Hugging Face's transformers, with vLLM's linear layers, norms and attentions put in. Its
layers are called with a batch of one, `[1, num_tokens, hidden_size]`; an attention returns a pair; and the model's
forward pass runs all layers, so that the tail's leave something in their place that does nothing.

vLLM imports the classes lazily by name, as `model_executors.layers.transformers_decoder:AttentionPlanOlmo2ForCausalLM`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices

from model_executors.attention_plan import ARCHITECTURE_PREFIX
from model_executors.families import family_of
from model_executors.layers.consolidation import Consolidation
from model_executors.layers.decoder import AttentionPlanDecoder, Tail, planned_class


class SkippedAttention(nn.Module):
    """A consolidation as transformers' layers call an attention."""

    def __init__(self, consolidation: Consolidation) -> None:
        super().__init__()
        self.consolidation = consolidation

    def forward(self, hidden_states: torch.Tensor, **unused: object) -> tuple[torch.Tensor, None]:
        """`[1, num_tokens, hidden_size]` to the same, and no attention weights."""
        return self.consolidation(None, hidden_states), None


class Deferred(nn.Module):
    """Holds the parts of a module that runs later, under their names, so that weights load as usual; does nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, part in module.named_children():
            self.add_module(name, part)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, hidden_states: torch.Tensor, *unused: object, **also_unused: object) -> torch.Tensor:
        """`[1, num_tokens, hidden_size]`, unchanged."""
        return hidden_states


class TransformersTail(Tail):
    """The tail, of transformers' layers."""

    def run(self, positions: Sequence[None], hidden_states: torch.Tensor) -> torch.Tensor:
        """`[num_sampled_tokens, hidden_size]` to the same; no layer here needs positions."""
        layers, norm = self.parts
        hidden_states = hidden_states.unsqueeze(0)
        for layer in layers:
            hidden_states = layer(hidden_states, position_embeddings=None, attention_mask=None)
        return norm(hidden_states).squeeze(0)


class LayersOfThisRank(nn.Module):
    """Tells the adapter which layers this pipeline rank holds, as vLLM's own decoders do."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        group = get_pp_group()
        layers = get_pp_indices(len(self.model.layers), group.rank_in_group, group.world_size)
        self.model.start_layer, self.model.end_layer = layers


class AttentionPlanTransformersDecoder(AttentionPlanDecoder, LayersOfThisRank):
    """Mixin before the class of vLLM's Transformers backend."""

    def _change_layer(self, number: int, vllm_config: VllmConfig) -> None:
        super()._change_layer(number, vllm_config)
        layer = self.model.layers[number]
        attention = getattr(layer, self.family.attention)
        if isinstance(attention, Consolidation):
            setattr(layer, self.family.attention, SkippedAttention(attention))

    def _defer_upper_layers(self, vllm_config: VllmConfig) -> None:
        model, first = self.model, self.plan.tail_start
        if not self.plan.has_tail:
            return
        norm = getattr(model, self.family.norm)
        with set_model_tag("tail"):
            self.tail = TransformersTail(
                vllm_config=vllm_config, layers=model.layers[first:], norm=norm, family=self.family
            )
        for number in range(first, len(model.layers)):
            model.layers[number] = Deferred(model.layers[number])
        setattr(model, self.family.norm, Deferred(norm))


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class that vLLM asks for by name (PEP 562)."""
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, planned_class(family_of(name), AttentionPlanTransformersDecoder))
