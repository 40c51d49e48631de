"""Window layers' attention on a CPU: to the first `sink` tokens and the last `window`, each once.

vLLM's CPU kernel knows no such mask and packs its KV cache in a way of its own. So a window layer's blocks are laid out
plainly here, a row a token. A step's queries are put in *bands* of consecutive tokens of one request; a band sees the
sink and the tokens from the first one's window on, by the rows where they lie. A band of one token sees all it is given
and takes the kernel that vLLM has for such lists, where it has one; others take torch's attention, with a mask.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from model_executors.hooks.kv_cache import SinkWindowSpec

SHORT = 8
"""The most tokens of a request that are bands of one each: those of a request that generates, speculated ones too."""
NARROWEST = 64
"""Tokens of a longer request's bands, or a quarter of the window where that is more."""
KEYS_AT_ONCE = 2**17
"""The most keys that are gathered at once, of all bands together."""
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

Slice = tuple[slice, torch.Tensor, torch.Tensor | None]
"""Some bands; where their keys lie, one band's after another's; and their part of the mask."""


@dataclass
class Bands:
    """Bands of one width."""

    tokens: torch.Tensor
    """`[bands, width]`, which of the step's queries they are; what is missing in a request's last band repeats."""
    request: np.ndarray
    """`[bands, 1]`"""
    places: np.ndarray
    """`[bands, keys]`, where what they see is in their request: the sink, and what follows from the first one's window
    on.
    """
    seen: torch.Tensor | None
    """`[bands, width, keys]`, which token sees which; a band of one token sees the first `count` keys."""
    count: torch.Tensor
    """`[bands]`"""
    every: torch.Tensor
    """`[bands]`, 0, 1, 2, ..."""
    slots: torch.Tensor = field(init=False)
    """`[bands, keys]`, where they lie in the KV cache."""
    slices: list[Slice] = field(init=False)
    """Of `slices_of`."""
    masks: list[torch.Tensor | None] = field(default_factory=list)
    """Of `mask`."""

    @classmethod
    def of(
        cls,
        request: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        window: int,
        sink: int,
    ) -> Self:
        """Bands of the step's `tokens`, which are at `positions` in their `request`: `[bands]`, twice `[bands, width]`.

        What follows the sink are the tokens from the first one's window on; none are twice in it.
        """
        width = tokens.shape[1]
        number = np.arange(min(sink + window - 1 + width, int(positions.max()) + 1))
        behind = np.maximum(positions[:, :1] + (1 - sink - window), 0)
        places = number + (number >= sink) * behind
        seen = None
        if width > 1:
            place, token = places[:, None], positions[:, :, None]
            seen = torch.from_numpy((place <= token) & ((place < sink) | (place > token - window)))
        count = torch.from_numpy(np.minimum(positions[:, 0] + 1, sink + window))
        return cls(torch.from_numpy(tokens), request[:, None], places, seen, count, torch.arange(len(tokens)))

    def find(self, block_table: torch.Tensor, block_size: int) -> None:
        """Set `slots` by the blocks of the step's requests, `[requests, blocks]`."""
        table = block_table.numpy()
        blocks = table[self.request, np.minimum(self.places // block_size, table.shape[1] - 1)]
        self.slots = torch.from_numpy(blocks * np.int64(block_size) + self.places % block_size)
        self.slices = []

    def slices_of(self, groups: int) -> list[Slice]:
        """The bands, as many at a time as are attended at once; made once for all layers of these blocks."""
        if not self.slices:
            bands, keys = self.places.shape
            at_once, mask = max(1, KEYS_AT_ONCE // keys), self.mask(groups)
            for start in range(0, bands, at_once):
                some = slice(start, min(start + at_once, bands))
                self.slices.append((some, self.slots[some].flatten(), None if mask is None else mask[some]))
        return self.slices

    def mask(self, groups: int) -> torch.Tensor | None:
        """`[bands, 1, width * groups or 1, keys]`, which token sees which, for each of `groups` heads of one K and V;
        None where each sees all. It is made once for all layers that have the bands.
        """
        if not self.masks:
            if self.seen is not None:
                self.masks.append(self.seen.repeat_interleave(groups, 1).unsqueeze(1))
            else:
                keys = self.places.shape[1]
                fewer = int(self.count.min()) < keys
                self.masks.append((torch.arange(keys) < self.count[:, None])[:, None, None] if fewer else None)
        return self.masks[0]


def cut(first: np.ndarray, end: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bands of `width` tokens of requests whose tokens are `first` to `end` in a step: their request `[bands]`, and
    their tokens `[bands, width]`.
    """
    bands = -(-(end - first) // width)
    request = np.repeat(np.arange(len(bands)), bands)
    number = np.arange(len(request)) - np.repeat(np.cumsum(bands) - bands, bands)
    tokens = (first[request] + number * width)[:, None] + np.arange(width)
    return request, np.minimum(tokens, end[request][:, None] - 1)


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step's queries, in bands of one token and in wider ones."""

    single: Bands | None
    wide: Bands | None
    in_order: bool
    """Whether the bands of one token are all of the step's tokens, in their order."""


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Makes a step's bands once for all layers of the same window and sink."""

    supports_update_block_table: bool = True
    kv_cache_spec: SinkWindowSpec

    def __init__(
        self, kv_cache_spec: SinkWindowSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.width = max(NARROWEST, kv_cache_spec.sliding_window // 4)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        """Cut the step in bands."""
        common, spec = common_attn_metadata, self.kv_cache_spec
        bounds = common.query_start_loc[: common.num_reqs + 1].numpy().astype(np.int64)
        first, end = bounds[:-1], bounds[1:]
        offset = common.seq_lens[: common.num_reqs].numpy() - end  # from a token in the step to where it is

        def bands(chosen: np.ndarray, width: int) -> Bands | None:
            request, tokens = cut(first[chosen], end[chosen], width)
            if not len(request):
                return None
            request = chosen[request]
            return Bands.of(request, tokens, tokens + offset[request][:, None], spec.sliding_window, spec.sink)

        requests = np.arange(common.num_reqs)
        short = end - first <= SHORT
        in_order = common.max_query_len <= SHORT
        single = bands(requests if in_order else requests[short], 1)
        wide = None if in_order else bands(requests[~short], self.width)
        return self._found(WindowMetadata(single, wide, in_order), common.block_table_tensor)

    def update_block_table(
        self, metadata: WindowMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> WindowMetadata:
        """The same for another group of the same layers, whose blocks are others."""
        updated = copy.copy(metadata)
        updated.single, updated.wide = copy.copy(metadata.single), copy.copy(metadata.wide)
        return self._found(updated, blk_table)

    def _found(self, metadata: WindowMetadata, block_table: torch.Tensor) -> WindowMetadata:
        for bands in (metadata.single, metadata.wide):
            if bands is not None:
                bands.find(block_table, self.kv_cache_spec.block_size)
        return metadata


class WindowImpl(AttentionImpl[WindowMetadata]):
    """Attends in bands.

    Raises:
        ValueError: for attention with ALiBi or sinks that are learnt.

    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        *args: Any,
        sinks: torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        if alibi_slopes is not None or sinks is not None:
            raise ValueError("a window layer's attention can have neither ALiBi nor sinks of its own; leave it full")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.quantized = FP8[kv_cache_dtype] if is_quantized_kv_cache(kv_cache_dtype) else None
        # vLLM builds it for AVX-512 alone, and not for float32.
        self.has_kernel = self.quantized is None and hasattr(torch.ops._C, "decode_attention_cpu")

    def rows(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The blocks' memory `[slots, num_kv_heads, 2 * head_size]`, K and V of a token side by side."""
        plain = kv_cache if self.quantized is None else kv_cache.view(self.quantized)
        return plain.view(-1, self.num_kv_heads, 2 * self.head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write K and V `[num_tokens, num_kv_heads, head_size]`; what has no slot, -1, goes where nothing is read."""
        held = self.rows(kv_cache)
        if self.quantized is not None:
            most = torch.finfo(self.quantized).max
            key, value = key / layer._k_scale_float, value / layer._v_scale_float
            key, value = (each.clamp(-most, most).to(self.quantized).view(torch.uint8) for each in (key, value))
            held = held.view(torch.uint8)
        held.index_copy_(0, slot_mapping.clamp(min=0), torch.cat((key, value), -1)[: len(slot_mapping)])

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: WindowMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with `query` `[num_tokens, num_heads, head_size]` to what is in the cache, into `output`."""
        if attn_metadata is None:  # a step that only warms up
            return output
        rows = self.rows(kv_cache)
        single, wide = attn_metadata.single, attn_metadata.wide
        if single is not None and self.has_kernel and query.dtype != torch.float32:
            if attn_metadata.in_order:
                count = len(single.every)
                self._attend_single(query[:count], rows, single, output[:count])
            else:
                tokens = single.tokens.flatten()
                made = torch.empty_like(asked := query[tokens])
                self._attend_single(asked, rows, single, made)
                output[tokens] = made
        elif single is not None:
            self._attend(layer, query, rows, single, output, attn_metadata.in_order)
        if wide is not None:
            self._attend(layer, query, rows, wide, output, False)
        return output

    def _attend_single(self, query: torch.Tensor, rows: torch.Tensor, bands: Bands, output: torch.Tensor) -> None:
        """Bands of one token, through vLLM's kernel: `[bands, num_heads, head_size]`."""
        key, value = rows[..., : self.head_size], rows[..., self.head_size :]
        scores = query.new_empty((len(query), self.num_heads, 1, self.head_size + 1), dtype=torch.float32)
        options = (self.scale, self.logits_soft_cap, False, -1, None, None)
        ops.cpu_mla_decode(
            query, key, value, output, None, None, None, scores, bands.slots, bands.every, bands.count, *options
        )

    def _attend(
        self, layer: Any, query: torch.Tensor, rows: torch.Tensor, bands: Bands, output: torch.Tensor, in_order: bool
    ) -> None:
        """Bands of any width, in torch: a slice of them at a time. `in_order` as in `WindowMetadata`."""
        keys, groups = bands.places.shape[1], self.num_heads // self.num_kv_heads
        # The heads that share one of K and V are more of its tokens: [bands, num_kv_heads, width * groups, head_size].
        shared = -1, self.num_kv_heads, bands.tokens.shape[1] * groups, self.head_size
        if self.quantized is not None:
            rows = rows.view(torch.uint8)
        for some, slots, seen in bands.slices_of(groups):
            kept = rows.index_select(0, slots)
            if self.quantized is not None:
                kept = kept.view(self.quantized).to(query.dtype)
            key, value = kept.view(-1, keys, self.num_kv_heads, 2 * self.head_size).transpose(1, 2).chunk(2, -1)
            if self.quantized is not None:
                key, value = key * layer._k_scale_float, value * layer._v_scale_float
            if in_order:
                output[some].view(shared).copy_(self._attention(query[some].view(shared), key, value, seen))
                continue
            tokens = bands.tokens[some]
            asked = query[tokens].unflatten(2, (self.num_kv_heads, groups)).transpose(1, 2).reshape(shared)
            made = self._attention(asked, key, value, seen)
            output[tokens] = made.unflatten(2, (-1, groups)).transpose(1, 2).flatten(2, 3)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        if not self.logits_soft_cap:
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)
        scores = query.float() @ key.float().transpose(2, 3) * (self.scale / self.logits_soft_cap)
        capped = scores.tanh() * self.logits_soft_cap
        weights = (capped if seen is None else capped.masked_fill(~seen, -torch.inf)).softmax(-1)
        return (weights @ value.float()).to(query.dtype)


class WindowBackend(CPUAttentionBackend):
    """vLLM's CPU backend with an attention of our own; it keeps the name, by which vLLM looks backends up."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:  # type: ignore[override]
        """What attends."""
        return WindowImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:  # type: ignore[override]
        """What prepares a step."""
        return WindowMetadataBuilder
