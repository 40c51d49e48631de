"""The linear map of every layer's attention, each fitted to the unchanged model: what a search tries plans with.

A plan that is chosen is fitted anew, layer after layer (`vllm_ext/offline/fit.py`), so that each fit sees what the
others left.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from model_executors.attention_plan import tensor_name
from vllm_ext.offline.attentions import Seen
from vllm_ext.offline.fit import Moments
from vllm_ext.offline.model import Activations, OfflineModel
from vllm_ext.planner.search import LINEAR


@torch.no_grad()
def fit_alone(model: OfflineModel, texts: Sequence[Activations], layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The linear map of each of `layers`, by its name in a checkpoint; `texts` have entered the model."""
    made: dict[str, torch.Tensor] = {}
    for number in range(max(layers, default=-1) + 1):
        moments = Moments(LINEAR)
        layer, attention = model.layers[number], model.attention(number)
        for entered in texts:
            states = entered.state(model, number)
            entered.forget(number)
            if number not in layers:
                continue
            for passage in states:
                hook = attention.register_forward_hook(moments, with_kwargs=True)
                with suppress(Seen):
                    entered.calls[number].through(layer, passage[None])
                hook.remove()
        if number in layers:
            made |= {tensor_name(number, name): tensor for name, tensor in moments.solve(torch.float32).items()}
    return made
