"""Attention functions for transformers' attentions, and what takes an attention's place where a plan says so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

QUERIES_AT_ONCE = 128

Forks = Sequence[tuple[int, int]]
"""Where tokens begin and end, each of which go on after the tokens before the first of these, as if there were no
others."""


class Seen(Exception):  # noqa: N818 - no error
    """Ends a layer's run where all that was to be seen of it has been seen."""


class Keep:
    """Takes the place of an attention function, and keeps what it would attend to."""

    key: torch.Tensor
    value: torch.Tensor

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> NoReturn:
        """`key` and `value` are `[batch, num_kv_heads, length, head_size]`."""
        self.key, self.value = key, value
        raise Seen


class Attend:
    """Takes the place of an attention function: with the K and V of some rows frozen, or a window and a sink, or both.

    `frozen_kv` are `[batch, num_kv_heads, length, head_size]`, `frozen_rows` `[batch, length]`.
    """

    def __init__(
        self,
        frozen_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
        frozen_rows: torch.Tensor | None = None,
        window: int | None = None,
        sink: int | None = None,
    ) -> None:
        self.frozen_kv, self.frozen_rows, self.window, self.sink = frozen_kv, frozen_rows, window, sink

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        forks: Forks = (),
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' attention functions; with a window the mask is the causal one, since no row is padded."""
        if self.frozen_kv is not None:
            assert self.frozen_rows is not None
            rows, length = self.frozen_rows[:, None, :, None], self.frozen_rows.shape[1]
            key, value = (
                torch.cat([torch.where(rows, frozen, own[:, :, :length]), own[:, :, length:]], 2)
                for frozen, own in zip(self.frozen_kv, (key, value), strict=True)
            )
        if self.window is not None:
            seen: dict[str, Any] = {"window": self.window, "sink": self.sink or 0, "forks": forks}
            return window_attention(query, key, value, scaling=scaling, softcap=softcap, **seen), None
        told = {"scaling": scaling, "softcap": softcap, "forks": forks}
        return stock_attention(module, query, key, value, attention_mask, **settings | told)


class Skipped(nn.Module):
    """Takes an attention's place: nothing, a constant vector, or a linear map of its input."""

    def __init__(self, **made: torch.Tensor) -> None:
        super().__init__()
        self.made = made

    def forward(self, hidden_states: torch.Tensor, *unused_args: Any, **unused: Any) -> tuple[torch.Tensor, None]:
        """As the attention's: `[1, length, hidden_size]` to the same."""
        made = {name: tensor.to(hidden_states) for name, tensor in self.made.items()}
        added = torch.zeros_like(hidden_states)
        if "weight" in made:
            added = hidden_states @ made["weight"].T
        elif "down" in made:
            added = hidden_states @ made["down"].T @ made["up"].T
        return added + made.get("bias", 0), None


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    sink: int,
    scaling: float,
    softcap: float | None = None,
    forks: Forks = (),
) -> torch.Tensor:
    """Attention to the first `sink` tokens and the last `window`, the token itself included, each once.

    `query` is `[batch, num_heads, queries, head_size]`, those of the last tokens, `key` and `value` `[batch,
    num_kv_heads, length, head_size]`; returns `[batch, queries, num_heads, head_size]`, as transformers' attention
    functions do. `QUERIES_AT_ONCE` queries at a time see the sink and the keys near them, so that the work grows with
    the window.
    """
    if forks:
        text = forks[0][0]
        seeing = partial(window_attention, window=window, sink=sink, scaling=scaling, softcap=softcap)
        parts = [seeing(query[:, :, :text], key[:, :, :text], value[:, :, :text])]
        for start, end in forks:
            keys, values = (torch.cat([part[:, :, :text], part[:, :, start:end]], 2) for part in (key, value))
            parts.append(seeing(query[:, :, start:end], keys, values))
        return torch.cat(parts, 1)
    groups, earlier = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    outputs: list[torch.Tensor] = []
    start = earlier
    for queries in query.split(QUERIES_AT_ONCE, 2):
        end = start + queries.shape[2]
        first = max(0, start - window + 1)
        places = torch.cat([torch.arange(min(sink, first)), torch.arange(first, end)]).to(query.device)
        keys, values = (part[:, :, places] for part in (key, value))
        behind = torch.arange(start, end, device=query.device)[:, None] - places
        seen = (behind >= 0) & ((behind < window) | (places < sink))
        outputs.append(_masked(queries, keys, values, seen, scaling, softcap, groups))
        start = end
    return torch.cat(outputs, 2).transpose(1, 2)


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    softcap: float | None,
    groups: int,
) -> torch.Tensor:
    """`[batch, num_heads, queries, head_size]`: attention to the keys that are `seen`, `[queries, keys]`."""
    if softcap is None:  # PyTorch's knows none
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=groups > 1
        )
    keys, values = (part.float().repeat_interleave(groups, 1) for part in (key, value))
    logits = capped(query.float() @ keys.transpose(2, 3) * scaling, softcap)
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values).to(query.dtype)


def attend_as_told(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The attention function of the model that is fitted: a layer's own where it is told of one, over the forks it is
    told of.
    """
    own = getattr(module, "attend", stock_attention)
    return own(module, query, key, value, *args, **kwargs | {"forks": getattr(module, "forks", ())})


def stock_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    softcap: float | None = None,
    forks: Forks = (),
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The model's own. PyTorch's knows no soft cap, and no forks."""
    if softcap is None and not forks:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    seen: dict[str, Any] = {"window": kwargs.get("sliding_window") or key.shape[2], "sink": 0, "forks": forks}
    return window_attention(query, key, value, scaling=kwargs["scaling"], softcap=softcap, **seen), None


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Attention's logits under Gemma 2's soft cap, where there is one."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


@contextmanager
def attending(attention: Any, **told: Any) -> Iterator[None]:
    """Tell an attention of another function to `attend` with, or of the `forks` of what it attends to."""
    for name, each in told.items():
        setattr(attention, name, each)
    try:
        yield
    finally:
        for name in told:
            delattr(attention, name)
