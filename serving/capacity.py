"""How much the KV cache of one engine holds, and what a stock model's would in the same memory.

Both follow from vLLM's own arithmetic over the layers' cache specifications: what a block takes is set by the largest
group of layers, and what a request takes by all groups, windows included.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_layout import KVCacheLayout

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import own_window
from model_executors.hooks.kv_cache import SinkWindowSpec


@dataclass(frozen=True)
class Capacity:
    """Of one engine, over all its ranks."""

    tokens: int
    """Of requests of the model's greatest length, as vLLM counts them."""
    bytes: int


def capacities(vllm_config: VllmConfig, plan: AttentionPlan) -> tuple[Capacity, Capacity] | None:
    """The capacity as it is, and a stock model's in the same bytes; None before the engine has said what it has."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    # vLLM's front end adds up the blocks of the engines that it talks to.
    engines = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    blocks = (cache.num_gpu_blocks or 0) // max(1, engines)
    if not blocks or cache.kv_cache_size_tokens is None:
        return None
    ours, _ = _block_and_request(vllm_config, plan)
    stock, request = _block_and_request(vllm_config, AttentionPlan.of(len(plan.layers)))
    size = blocks * ours
    stock_tokens = int(size // stock / request * vllm_config.model_config.max_model_len)
    ranks = parallel.tensor_parallel_size
    return Capacity(cache.kv_cache_size_tokens, size * ranks), Capacity(stock_tokens, size // stock * stock * ranks)


def _block_and_request(vllm_config: VllmConfig, plan: AttentionPlan) -> tuple[int, int]:
    """Bytes of a block on one rank, and blocks of a request of the greatest length."""
    specs = {
        f"model.layers.{layer}.self_attn.attn": _spec(vllm_config, layer, plan.layers[layer])
        for layer in plan.attending
    }
    groups = get_kv_cache_groups(_with_layout(vllm_config), specs)
    sizes = []
    for group in groups:
        whole = isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)  # whose page is that of all its layers
        sizes.append(group.kv_cache_spec.page_size_bytes * (1 if whole else len(group.layer_names)))
    request = sum(
        cdiv(group.kv_cache_spec.max_memory_usage_bytes(vllm_config), group.kv_cache_spec.page_size_bytes)
        for group in groups
    )
    return max(sizes), request


def _with_layout(vllm_config: VllmConfig) -> VllmConfig:
    """With a layout of the cache: the engine settles it in its own process, and pages of one size are grouped alike in
    all of them.
    """
    if vllm_config.cache_config.kv_cache_layout is not None:
        return vllm_config
    settled = copy(vllm_config)
    settled.cache_config = copy(vllm_config.cache_config)
    settled.cache_config.kv_cache_layout = KVCacheLayout.LBNHC.name
    return settled


def _spec(vllm_config: VllmConfig, layer: int, plan: LayerPlan) -> KVCacheSpec:
    """As vLLM's attention layers state it."""
    config, cache = vllm_config.model_config, vllm_config.cache_config
    common: dict[str, Any] = {
        "block_size": cache.block_size,
        "num_kv_heads": config.get_num_kv_heads(vllm_config.parallel_config),
        "head_size": config.get_head_size(),
        "dtype": cache_dtype(vllm_config),
    }
    window = plan.window or own_window(config.hf_config, layer)
    if window is None:
        return FullAttentionSpec(**common)
    sliding = SlidingWindowSpec(**common, sliding_window=window)
    return sliding if plan.sink is None else SinkWindowSpec.of(sliding, plan.sink, vllm_config)


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """The type of what the KV cache holds."""
    named = vllm_config.cache_config.cache_dtype
    return torch_dtype(vllm_config.model_config.dtype if named == "auto" else named)


def torch_dtype(named: str | torch.dtype) -> torch.dtype:
    """The type that vLLM's configuration names."""
    return named if isinstance(named, torch.dtype) else STR_DTYPE_TO_TORCH_DTYPE[named]
