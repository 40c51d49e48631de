"""Attention within a sliding window, beside a constant sink.

Attention in the upper layers goes to the first token, the *sink*, and to the neighbourhood (arXiv 2409.03621). A window
layer keeps the neighbourhood in its KV cache and replaces the first token by two constants fitted on text: the logit
that a query gives it, and its value s. vLLM's kernels know a sink's logit, whose value is zero. So the cache holds
v - s, and s is added to the result: sum p_j (v_j - s) + s = sum p_j v_j + p_sink s, exactly, for all p add up to one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend

Backend = type[AttentionBackend]


def rebuilt(
    attn: Attention,
    cache_config: CacheConfig,
    forward_context: dict[str, Any],
    backend: Callable[[Backend], Backend] | None,
    **changes: Any,
) -> Attention:
    """An attention like `attn` but for `changes`, under its name, where `backend` makes its backend from vLLM's choice.

    `forward_context` is what gives an attention its KV cache.
    """
    settings: dict[str, Any] = {
        "num_kv_heads": attn.num_kv_heads,
        "cache_config": cache_config,
        "quant_config": attn.quant_config,
        "logits_soft_cap": getattr(attn.impl, "logits_soft_cap", None) or None,
        "per_layer_sliding_window": attn.sliding_window,
        "prefix": attn.layer_name,
    } | changes
    del forward_context[attn.layer_name]
    made = Attention(attn.num_heads, attn.head_size, attn.impl.scale, **settings)
    if backend is None:
        return made
    del forward_context[attn.layer_name]
    settings["attn_backend"] = backend(made.attn_backend)
    return Attention(attn.num_heads, attn.head_size, attn.impl.scale, **settings)


class WindowAttention(nn.Module):
    """Takes an attention's place, with a window of `window` tokens, the token itself included.

    Raises:
        ValueError: where the attention has a sliding window of its own, and so never saw a sink from afar.

    """

    def __init__(
        self,
        attn: Attention,
        window: int,
        cache_config: CacheConfig,
        forward_context: dict[str, Any],
        backend: Callable[[Backend], Backend] | None,
    ) -> None:
        super().__init__()
        if attn.sliding_window is not None:
            raise ValueError(
                f"{attn.layer_name} has a sliding window of {attn.sliding_window} by itself; leave that layer full"
            )
        self.sink_logit = self._fitted(attn.num_heads, attn.num_heads)
        self.sink_value = self._fitted(attn.num_kv_heads, attn.num_kv_heads, attn.head_size)
        changes = {"per_layer_sliding_window": window, "sinks": self.sink_logit}
        self.attn = rebuilt(attn, cache_config, forward_context, backend, **changes)

    @staticmethod
    def _fitted(heads: int, *shape: int) -> nn.Parameter:
        """A parameter whose first dimension is this rank's heads; where ranks share KV heads, they share its rows."""
        parameter = nn.Parameter(torch.empty(shape), requires_grad=False)

        def load(parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            first = get_tensor_model_parallel_rank() * loaded.shape[0] // get_tensor_model_parallel_world_size()
            parameter.data.copy_(loaded[first : first + heads])

        parameter.weight_loader = load  # type: ignore[attr-defined]
        return parameter

    @property
    def fitted(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that fitted tensors have in a checkpoint."""
        return {"sink_logit": self.sink_logit, "sink_value": self.sink_value}

    def shifted(self, value: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, num_kv_heads * head_size]`: what the KV cache holds in place of the value."""
        return value - self.sink_value.flatten()

    def unshifted(self, output: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, num_heads * head_size]`: the attention's output with the sink's value in it."""
        kv_heads, head_size = self.sink_value.shape
        return (output.unflatten(1, (kv_heads, -1, head_size)) + self.sink_value.unsqueeze(1)).flatten(1)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `Attention`'s: `[num_tokens, num_heads * head_size]`, twice `[num_tokens, num_kv_heads * head_size]`."""
        return self.unshifted(self.attn(query, key, self.shifted(value)))
