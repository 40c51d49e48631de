"""Window layers: attention to the first tokens, the *sink*, and to the last ones, the *window*, each token once.

Attention in many layers goes to the first token and to the neighbourhood (arXiv 2409.03621; StreamingLLM, arXiv
2309.17453). A window layer keeps both, and gives back the KV cache of all between. Keys were rotated where their tokens
truly are, so that nothing is rotated anew, nothing is fitted, and a request within its window is answered as by stock.
"""

from collections.abc import Callable
from typing import Any

from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from model_executors.hooks.kv_cache import SinkWindowSpec

Backend = type[AttentionBackend]


def rebuilt(
    attn: Attention,
    cache_config: CacheConfig,
    forward_context: dict[str, Any],
    backend: Callable[[Backend], Backend],
    made: Callable[..., Attention] = Attention,
    **changes: Any,
) -> Attention:
    """An attention like `attn` but for `changes`, under its name, where `backend` makes its backend from vLLM's choice.

    `forward_context` is what gives an attention its KV cache; `made` makes it.
    """
    settings: dict[str, Any] = {
        "num_kv_heads": attn.num_kv_heads,
        "cache_config": cache_config,
        "quant_config": attn.quant_config,
        "logits_soft_cap": getattr(attn.impl, "logits_soft_cap", None) or None,
        "per_layer_sliding_window": attn.sliding_window,
        "prefix": attn.layer_name,
        "attn_backend": backend(attn.attn_backend),
    } | changes
    del forward_context[attn.layer_name]
    return made(attn.num_heads, attn.head_size, attn.impl.scale, **settings)


class WindowAttention(Attention):
    """vLLM's attention with a sliding window of `per_layer_sliding_window` tokens, and the first `sink` ones."""

    def __init__(self, *args: Any, sink: int, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sink = sink

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """What the layer's KV cache is: vLLM's for the window, with the sink."""
        window = super().get_kv_cache_spec(vllm_config)
        assert isinstance(window, SlidingWindowSpec)
        return SinkWindowSpec.of(window, self.sink, vllm_config)


def window_attention(
    attn: Attention,
    window: int,
    sink: int,
    cache_config: CacheConfig,
    forward_context: dict[str, Any],
    backend: Callable[[Backend], Backend],
) -> WindowAttention:
    """Take the place of `attn` with a window of `window` tokens, the token itself included, and a sink.

    Raises:
        ValueError: where the attention has a sliding window of its own, or its backend has no window with a sink.

    """
    if attn.sliding_window is not None:
        raise ValueError(
            f"{attn.layer_name} has a sliding window of {attn.sliding_window} by itself; leave that layer full"
        )
    context = (cache_config, forward_context, lambda stock: backend(window_backend(stock)))
    made = rebuilt(attn, *context, WindowAttention, per_layer_sliding_window=window, sink=sink)
    assert isinstance(made, WindowAttention)
    return made


def window_backend(stock: Backend) -> Backend:
    """The backend that knows windows with a sink, by the one that vLLM chose.

    Raises:
        ValueError: where there is none.

    """
    if current_platform.is_cpu():
        from model_executors.layers import window_cpu

        return window_cpu.WindowBackend
    if current_platform.is_cuda_alike() and not stock.is_mla():
        from model_executors.layers import window_triton

        return window_triton.WindowBackend
    raise ValueError(f"window layers do not work with attention backend {stock.get_name()}; leave all layers full")
