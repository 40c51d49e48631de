"""What each layer's attention looks at, and how much it changes, on prose.

A window with the first tokens can stand for an attention that looks at its neighbourhood and the first token. One that
hardly changes the stream can be left out, by the criterion of *What Matters in Transformers?* (arXiv 2406.15786): the
cosine of the stream before and after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_ext.offline.attentions import Attend, attending, capped
from vllm_ext.offline.model import Activations, OfflineModel

WINDOW = 128


@dataclass(frozen=True)
class AttentionStats:
    """Means over heads and over the tokens of texts that have more than a window before them."""

    sink: float
    """The part of the attention that is on the first token."""
    window: float
    """The part that is on the last `WINDOW` tokens, the token's own included."""
    similarity: float
    """The cosine of the stream before and after the attention, over all tokens."""


@torch.no_grad()
def attention_stats(model: OfflineModel, number: int, batches: Sequence[Activations]) -> AttentionStats:
    """Of one layer of the unchanged model; every text is longer than `WINDOW` tokens."""
    layer, attention = model.layers[number], model.attention(number)
    seen = torch.zeros(2)
    similar = rows = 0.0
    for entered in batches:
        states = entered.state(model, number)
        watch = Watch()
        outputs: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        hooks = [attention.register_forward_hook(lambda *called, kept=outputs: kept.append(called[2][0]))]
        if (norm := _norm_after(layer, model.family.input_norm)) is not None:
            hooks.append(norm.register_forward_pre_hook(lambda *called, kept=after: kept.append(called[1][0])))
        try:
            with attending(attention, attend=watch):
                entered.states[number + 1] = entered.calls[number].through(layer, states)
        finally:
            for hook in hooks:
                hook.remove()
        changed = after[0] if after else states + outputs[0]
        seen += watch.seen * len(states)
        similar += torch.nn.functional.cosine_similarity(states, changed, dim=-1).mean().item() * len(states)
        rows += len(states)
    sink, window = (seen / rows).tolist()
    return AttentionStats(sink, window, similar / rows)


def _norm_after(layer: Any, input_norm: str | None) -> Any:
    """The module that reads the stream after the attention; None where the MLP reads it from before."""
    if input_norm is None:  # as in OLMo 2
        return layer.mlp
    names = ("pre_feedforward_layernorm", "feedforward_layernorm", "post_attention_layernorm")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


class Watch:
    """Takes the place of an attention function: attends as the model does, and sees to what."""

    seen: torch.Tensor
    """`[2]`: on the first token, and on the last `WINDOW`."""

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """`query` is `[batch, num_heads, length, head_size]`; the attention of each text is written out."""
        length = query.shape[2]
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        behind = torch.arange(length, device=key.device)[:, None] - torch.arange(length, device=key.device)
        far = slice(WINDOW, None)
        hidden = behind[far] < 0
        if settings.get("sliding_window"):
            hidden |= behind[far] >= settings["sliding_window"]
        logits = capped(query[:, :, far].float() @ keys.float().transpose(2, 3) * scaling, softcap)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((0, 1))
        near = weights.masked_fill(behind[far] >= WINDOW, 0).sum(-1).mean()
        self.seen = torch.stack([weights[:, 0].mean(), near]).cpu()
        return Attend()(module, query, key, value, attention_mask, scaling, softcap, **settings)
