"""A window on one KV head of a layer alone: which heads of a layer fetch (arXiv 2404.15574 calls them retrieval heads).

The plan stays by layers, since a layer's KV cache is kept or given back as a whole.
"""

from typing import Any

import torch
from torch import nn

from vllm_ext.offline.attentions import Forks, stock_attention, window_attention


class WindowedHead:
    """Takes the place of an attention function: the model's own, but for the query heads of one KV head."""

    def __init__(self, window: int, sink: int, head: int) -> None:
        self.window, self.sink, self.head = window, sink, head

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
        """As transformers' attention functions: `[batch, queries, num_heads, head_size]`."""
        attended, _ = stock_attention(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, forks=forks, **settings
        )
        groups = query.shape[1] // key.shape[1]
        rows, head = slice(self.head * groups, (self.head + 1) * groups), slice(self.head, self.head + 1)
        near = window_attention(
            query[:, rows],
            key[:, head],
            value[:, head],
            window=self.window,
            sink=self.sink,
            scaling=scaling,
            softcap=softcap,
            forks=forks,
        )
        return torch.cat([attended[:, :, : rows.start], near, attended[:, :, rows.stop :]], 2), None
