"""The tensors of every layer's alternatives, each fitted to the unchanged model: what a search tries plans with.

A plan that is chosen is fitted anew, layer after layer (`vllm_ext/offline/fit.py`), so that each fit sees what the
others left.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch

from model_executors.attention_plan import LayerPlan, tensor_name
from vllm_ext.offline.attentions import Seen, attending
from vllm_ext.offline.fit import Moments, Sinks
from vllm_ext.offline.model import Entered, OfflineModel

LINEAR = LayerPlan("skip", consolidation="linear")


@torch.no_grad()
def fit_alone(
    model: OfflineModel, texts: Sequence[Entered], window: int, layers: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The sink of a window and the linear map of each of `layers`, by their names in a checkpoint.

    `texts` have entered the model.
    """
    made: dict[str, torch.Tensor] = {}
    for number in range(max(layers) + 1):
        sinks, moments = Sinks(window), Moments(LINEAR)
        layer, attention = model.layers[number], model.attention(number)
        for entered in texts:
            states = entered.state(model, number)
            entered.forget(number)
            if number not in layers:
                continue
            for passage in states:
                with attending(attention, sinks), suppress(Seen):
                    entered.calls[number].through(layer, passage[None])
                hook = attention.register_forward_hook(moments, with_kwargs=True)
                with suppress(Seen):
                    entered.calls[number].through(layer, passage[None])
                hook.remove()
        if number in layers:
            found = sinks.solve() | moments.solve(torch.float32)
            made |= {tensor_name(number, name): tensor for name, tensor in found.items()}
    return made
