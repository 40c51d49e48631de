"""The residual stream through a run of decoder layers, for the parts of a model that do not run in its forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from model_executors.families import Family


def normed(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """`[num_tokens, hidden_size]` through a norm by itself; some families' norms return a pair even so."""
    output = norm(hidden_states)
    return output[0] if isinstance(output, tuple) else output


class DeferredLayers(nn.Module):
    """Layers that run apart from the stock model's forward pass, and the norm after them.

    They stay the stock model's: here they are in a tuple, or torch would list their parameters a second time.
    """

    def __init__(
        self, *, vllm_config: VllmConfig, layers: Sequence[nn.Module], norm: nn.Module, family: Family
    ) -> None:
        super().__init__()
        self.parts = (tuple(layers), norm)
        self.family = family

    def run(self, positions: Sequence[Any], hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the layers, each with its own `positions`, and the norm: `[num_tokens, hidden_size]` to the same."""
        torch._check(hidden_states.shape[0] > 0)  # experts ask, and a compiler may not know
        layers, norm = self.parts
        residual = None
        for layer, where in zip(layers, positions, strict=True):
            if self.family.residual:
                hidden_states, residual = layer(where, hidden_states, residual)
            else:
                leaving = layer(where, hidden_states)
                hidden_states = leaving[0] if isinstance(leaving, tuple) else leaving
        if self.family.residual and self.family.split:
            return norm(hidden_states, residual)[0]
        return normed(norm, hidden_states)


class ResidualSum(nn.Module):
    """Stands where the final norm stood: closes the residual stream and leaves the norm to what runs later.

    It holds the norm's parameters, under the same names, so that they are loaded as they would have been.
    """

    def __init__(self, norm: nn.Module, family: Family) -> None:
        super().__init__()
        self.split = family.split
        for name, parameter in norm.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, hidden_states: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        """`[num_tokens, hidden_size]` twice, to their sum; a stream by itself as it is."""
        if not residual:
            return hidden_states
        return hidden_states + residual[0] if self.split else hidden_states, None
