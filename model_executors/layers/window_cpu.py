"""Window layers' attention on a CPU: to the first `sink` tokens and the last `window`, each once.

vLLM's CPU kernel knows no such mask and packs its KV cache in a way of its own. So a window layer's blocks are laid out
plainly here, a row a token. A step's queries are put in *bands* of consecutive tokens of one request; a band sees the
sink and the tokens from the first one's window on, by the rows where they lie. A band of one token sees all it is given
and takes the kernel that vLLM has for such lists; a wider one takes torch's attention, with a mask.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

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


def seen_places(token: torch.Tensor, window: int, sink: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each band sees: the places of its keys in the request `[bands, keys]`, and which of its tokens sees which,
    `[bands, width, keys]`.

    `token` `[bands, width]` is where a band's tokens are in their request, of which the first is the lowest.
    """
    behind = (token[:, :1] + 1 - sink - window).clamp(min=0)  # what no token of the band sees, after the sink
    number = torch.arange(sink + window - 1 + token.shape[1])
    places = torch.where(number < sink, number, number + behind)
    token, place = token.unsqueeze(2), places.unsqueeze(1)
    return places, (place <= token) & ((place < sink) | (place > token - window))


@dataclass
class Bands:
    """Bands of one width."""

    tokens: torch.Tensor
    """`[bands, width]`, which of the step's queries they are; what is missing in a request's last band repeats."""
    request: torch.Tensor
    """`[bands]`"""
    places: torch.Tensor
    """`[bands, keys]`, what they see."""
    seen: torch.Tensor
    """`[bands, width, keys]`"""
    count: torch.Tensor
    """`[bands]`, the keys that a band of one token sees: the first ones of its places."""
    slots: torch.Tensor = field(init=False)
    """`[bands, keys]`, where they lie in the KV cache."""

    @classmethod
    def of(
        cls, first: torch.Tensor, end: torch.Tensor, position: torch.Tensor, width: int, window: int, sink: int
    ) -> "Bands":
        """Cut requests in bands: their tokens are `first` to `end` in the step, `position` is the first's in the
        request, all `[requests]`.
        """
        bands = (end - first + width - 1) // width
        request = torch.repeat_interleave(torch.arange(len(bands)), bands)
        number = torch.arange(len(request)) - (bands.cumsum(0) - bands)[request]
        tokens = (first[request] + number * width).unsqueeze(1) + torch.arange(width)
        tokens = tokens.minimum(end[request].unsqueeze(1) - 1)
        places, seen = seen_places(tokens + (position - first)[request].unsqueeze(1), window, sink)
        return cls(tokens, request, places, seen, seen[:, 0].sum(1))

    def find(self, block_table: torch.Tensor, block_size: int) -> None:
        """Set `slots` by the requests' blocks, `[requests, blocks]`."""
        blocks = (self.places // block_size).clamp_(max=block_table.shape[1] - 1)
        of_band = block_table[self.request].long()
        self.slots = of_band.gather(1, blocks) * block_size + self.places % block_size


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step's queries, in bands of one token and in wider ones."""

    single: Bands | None
    wide: Bands | None
    in_order: bool
    """Whether the bands of one token are all of the step's tokens, in their order."""
    requests: tuple[torch.Tensor, torch.Tensor]
    """Which of the step's requests are those of `single`, and of `wide`."""


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
        common, window, sink = common_attn_metadata, self.kv_cache_spec.sliding_window, self.kv_cache_spec.sink
        bounds = common.query_start_loc[: common.num_reqs + 1].long()
        first, end = bounds[:-1], bounds[1:]
        position = common.seq_lens[: common.num_reqs].long() - (end - first)
        if common.max_query_len <= SHORT:
            every = torch.arange(common.num_reqs)
            metadata = WindowMetadata(
                Bands.of(first, end, position, 1, window, sink), None, in_order=True, requests=(every, every[:0])
            )
        else:
            short = end - first <= SHORT
            chosen = short.nonzero().flatten(), (~short).nonzero().flatten()
            single, wide = (
                Bands.of(first[some], end[some], position[some], width, window, sink) if len(some) else None
                for some, width in zip(chosen, (1, self.width), strict=True)
            )
            metadata = WindowMetadata(single, wide, False, chosen)
        return self._found(metadata, common.block_table_tensor)

    def update_block_table(
        self, metadata: WindowMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> WindowMetadata:
        """The same for another group of the same layers, whose blocks are others."""
        updated = copy.copy(metadata)
        updated.single, updated.wide = copy.copy(metadata.single), copy.copy(metadata.wide)
        return self._found(updated, blk_table)

    def _found(self, metadata: WindowMetadata, block_table: torch.Tensor) -> WindowMetadata:
        for bands, requests in zip((metadata.single, metadata.wide), metadata.requests, strict=True):
            if bands is not None:
                bands.find(block_table[requests], self.kv_cache_spec.block_size)
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

    def rows(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The blocks' memory `[slots, num_kv_heads, 2 * head_size]`, K and V of a token side by side."""
        plain = kv_cache if self.quantized is None else kv_cache.view(self.quantized)
        return plain.view(-1, self.num_kv_heads, 2 * self.head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write K and V `[num_tokens, num_kv_heads, head_size]`; what has no slot, -1, goes where nothing is read."""
        if self.quantized is not None:
            key, value = key / layer._k_scale_float, value / layer._v_scale_float
        rows = torch.cat((key, value), -1)[: len(slot_mapping)]
        if self.quantized is not None:
            most = torch.finfo(self.quantized).max
            rows = rows.clamp(-most, most).to(self.quantized).view(torch.uint8)
            kv_cache = kv_cache.view(torch.uint8)
            kv_cache.view(-1, self.num_kv_heads, 2 * self.head_size)[slot_mapping.clamp(min=0)] = rows
            return
        self.rows(kv_cache)[slot_mapping.clamp(min=0)] = rows

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
        if single is not None and query.dtype != torch.float32 and self.quantized is None:
            tokens = single.tokens.flatten()
            asked, made = query, output
            if attn_metadata.in_order:
                asked, made = query[: len(tokens)], output[: len(tokens)]
            else:
                asked = query[tokens]
                made = torch.empty_like(asked)
            self._attend_single(asked, rows, single, made)
            if not attn_metadata.in_order:
                output[tokens] = made
        elif single is not None:
            self._attend(layer, query, rows, single, output)
        if wide is not None:
            self._attend(layer, query, rows, wide, output)
        return output

    def _attend_single(self, query: torch.Tensor, rows: torch.Tensor, bands: Bands, output: torch.Tensor) -> None:
        """Bands of one token, through vLLM's kernel: `[bands, num_heads, head_size]`."""
        key, value = rows[..., : self.head_size], rows[..., self.head_size :]
        scores = query.new_empty((len(query), self.num_heads, 1, self.head_size + 1), dtype=torch.float32)
        every = torch.arange(len(query))
        options = (self.scale, self.logits_soft_cap, False, -1, None, None)
        ops.cpu_mla_decode(
            query, key, value, output, None, None, None, scores, bands.slots, every, bands.count, *options
        )

    def _attend(self, layer: Any, query: torch.Tensor, rows: torch.Tensor, bands: Bands, output: torch.Tensor) -> None:
        """Bands of any width, in torch: a slice of them at a time."""
        at_once = max(1, KEYS_AT_ONCE // bands.places.shape[1])
        for start in range(0, len(bands.tokens), at_once):
            some = slice(start, start + at_once)
            tokens, seen = bands.tokens[some], bands.seen[some]
            kept = rows[bands.slots[some]]  # [bands, keys, num_kv_heads, 2 * head_size]
            key, value = (part.transpose(1, 2) for part in kept.split(self.head_size, -1))
            if self.quantized is not None:
                key, value = key.to(query.dtype) * layer._k_scale_float, value.to(query.dtype) * layer._v_scale_float
            # The heads that share one of K and V are more of its tokens.
            asked = query[tokens].unflatten(2, (self.num_kv_heads, -1))  # [bands, width, num_kv_heads, groups, size]
            width, groups = asked.shape[1], asked.shape[3]
            asked = asked.transpose(1, 2).flatten(2, 3)
            mask = seen.repeat_interleave(groups, 1).unsqueeze(1)
            made = self._attention(asked, key, value, mask)
            output[tokens] = made.unflatten(2, (width, groups)).transpose(1, 2).flatten(2, 3)

    def _attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        if not self.logits_soft_cap:
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)
        scores = query.float() @ key.float().transpose(2, 3) * (self.scale / self.logits_soft_cap)
        weights = (scores.tanh() * self.logits_soft_cap).masked_fill(~seen, -torch.inf).softmax(-1)
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
