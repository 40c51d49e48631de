"""What *Attend First, Consolidate Later* (arXiv 2409.03621, section 3) does to a model at layer k.

It changes the states of previous tokens: all of the prompt's but the last. The prompt's last token and those generated
after it flow as they are, but attend to what the previous ones have become.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from model_executors.attention_plan import LayerPlan
from vllm_ext.offline.evaluator import Manipulation

Name = Literal["random", "shuffle", "freeze", "skip", "drop", "window"]
WINDOW = 128
NAMES: tuple[Name, ...] = get_args(Name)
TITLES: dict[Name, str] = {
    "random": "random",
    "shuffle": "shuffle",
    "freeze": "freeze",
    "skip": "skip attention",
    "drop": "this layer's attention alone",
    "window": "a window on this layer alone",
}


def manipulation(name: Name, layer: int, num_layers: int, seed: int) -> Manipulation:
    """The one of that name at layer k, from 0.

    *random* puts Gaussian vectors of the same norm in place of the previous tokens' states; *shuffle* permutes their
    dimensions, all in the same way; *freeze* keeps those states for all layers above; *skip* drops the attention from
    here on, with the norm before it; *drop* does so in this layer alone, and *window* has it attend to its first tokens
    and the last `WINDOW` alone.
    """
    above = range(layer, num_layers)
    if name == "freeze":
        return Manipulation(layer, dict.fromkeys(above, LayerPlan("freeze")))
    if name == "skip":
        return Manipulation(layer, dict.fromkeys(above, LayerPlan("skip")))
    if name == "drop":
        return Manipulation(layer, {layer: LayerPlan("skip")})
    if name == "window":
        return Manipulation(layer, {layer: LayerPlan("window", WINDOW)})
    make = randomised if name == "random" else shuffled
    return Manipulation(layer, {}, lambda states, rows: torch.where(rows[..., None], make(states, seed), states))


def randomised(states: torch.Tensor, seed: int) -> torch.Tensor:
    """Gaussian vectors with the norms of `states` `[batch, length, hidden_size]`, the same directions in each text."""
    generator = torch.Generator().manual_seed(seed)  # the CPU's, so that every machine draws the same
    noise = torch.randn(states.shape[1:], generator=generator).to(states)
    return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def shuffled(states: torch.Tensor, seed: int) -> torch.Tensor:
    """One permutation of the dimensions of `states` `[..., hidden_size]`."""
    order = torch.randperm(states.shape[-1], generator=torch.Generator().manual_seed(seed))
    return states[..., order.to(states.device)]


def injected(states: torch.Tensor, positions: Sequence[Sequence[int]], others: torch.Tensor) -> torch.Tensor:
    """Put the states of another prompt's tokens in the place of these.

    `states` are `[batch, length, hidden_size]`; `positions` the rows of each prompt, as many in all; `others` `[batch,
    number of positions, hidden_size]`.
    """
    changed = states.clone()
    batch = torch.arange(len(states))[:, None]
    changed[batch, torch.tensor(positions)] = others
    return changed
