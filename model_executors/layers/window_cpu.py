"""Window layers' attention on a CPU: to the first `sink` tokens and the last `window`, each once.

vLLM's CPU kernel knows windows, and no sink. But attention does not ask in which order its keys come, which were
rotated before. So a step's tokens are cut in *pieces* of at most `window` consecutive tokens of one request, and the
keys of a piece are packed anew for the kernel: what its first token's window has before it, then the sink, then the
piece's own. A window of `window + sink` that slides over these sees, for each token of the piece, its window and the
sink.

Blocks are laid out plainly here, a row a token. A token that is alone in its request's step sees all it is given, and
takes the kernel that vLLM has for such lists of rows, where it has one: nothing is packed for it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from model_executors.hooks.kv_cache import SinkWindowSpec

PACKED = 128
"""Tokens of a block that keys are packed in: vLLM's own for CPUs, with which its kernel is fastest."""
PACKED_ALONE = 32
"""The same where each piece is one token, and packing its keys is most of the work; the fewest the kernel takes."""
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}

Kernel = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Singles:
    """Tokens that are alone in their request's step."""

    tokens: torch.Tensor
    """`[tokens]`, which of the step's they are."""
    request: np.ndarray
    """`[tokens, 1]`"""
    places: np.ndarray
    """`[tokens, keys]`, where what they see is in their request: the sink, and what follows from the window on."""
    count: torch.Tensor
    """`[tokens]`, how many of the keys each sees, the first ones."""
    every: torch.Tensor
    """`[tokens]`, 0, 1, 2, ..."""
    slots: torch.Tensor = field(init=False)
    """`[tokens, keys]`, where they lie in the KV cache."""

    @classmethod
    def of(cls, request: np.ndarray, tokens: np.ndarray, positions: np.ndarray, window: int, sink: int) -> Self:
        """The step's `tokens`, which are at `positions` in their `request`: all `[tokens]`."""
        number = np.arange(min(sink + window, int(positions.max()) + 1))
        behind = np.maximum(positions[:, None] + (1 - sink - window), 0)
        places = number + (number >= sink) * behind
        count = torch.from_numpy(np.minimum(positions + 1, sink + window))
        return cls(torch.from_numpy(tokens), request[:, None], places, count, torch.arange(len(tokens)))


@dataclass(frozen=True)
class Piece:
    """Tokens `first` to `end` of a request."""

    request: int
    first: int
    end: int

    def keys(self, window: int, sink: int) -> np.ndarray:
        """Where in the request they are; all before it, where nothing has left the window yet."""
        if self.first < window + sink:
            return np.arange(self.end)
        before, own = np.arange(self.first - window + 1, self.first), np.arange(self.first, self.end)
        return np.concatenate((before, np.arange(sink), own))


@dataclass
class Pieces:
    """Pieces of a step's requests, one after another."""

    tokens: torch.Tensor
    """`[tokens]`, which of the step's they are."""
    bounds: torch.Tensor
    """`[pieces + 1]`, where in `tokens` each begins and ends."""
    lengths: torch.Tensor
    """`[pieces]`, how many keys each has."""
    request: np.ndarray
    """`[keys]`"""
    places: np.ndarray
    """`[keys]`, where they are in their request."""
    packed: torch.Tensor
    """`[keys]`, where they are packed, by slots."""
    blocks: torch.Tensor
    """`[pieces, blocks]`, where they are packed, by blocks."""
    block_size: int
    window: int
    """That slides over them."""
    slots: torch.Tensor = field(init=False)
    """`[keys]`, where they lie in the KV cache."""
    kernels: dict[tuple[Any, ...], Kernel] = field(default_factory=dict)
    """Of `kernel`."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], offset: np.ndarray, window: int, sink: int) -> Self:
        """`offset` is how much more a token's position in its request is than that in the step."""
        keys = [piece.keys(window, sink) for piece in pieces]
        lengths = np.array([len(each) for each in keys])
        block_size = PACKED if any(each.end - each.first > 1 for each in pieces) else PACKED_ALONE
        blocks = -(-lengths // block_size)
        first = np.cumsum(blocks) - blocks
        return cls(
            torch.from_numpy(
                np.concatenate([np.arange(each.first, each.end) - offset[each.request] for each in pieces])
            ),
            torch.from_numpy(np.cumsum([0, *(each.end - each.first for each in pieces)], dtype=np.int32)),
            torch.from_numpy(lengths.astype(np.int32)),
            np.repeat([each.request for each in pieces], lengths),
            np.concatenate(keys),
            torch.from_numpy(
                np.concatenate([np.arange(length) + block_size * at for length, at in zip(lengths, first, strict=True)])
            ),
            torch.from_numpy(np.minimum(first[:, None] + np.arange(blocks.max()), blocks.sum() - 1).astype(np.int32)),
            block_size,
            window + sink,
        )

    def kernel(self, num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Kernel:
        """Which of vLLM's kernels, room for keys and for values, and how the work is divided; once for all layers."""
        asked = num_heads, num_kv_heads, head_size, dtype
        if asked not in self.kernels:
            isa = _get_attn_isa(dtype, self.block_size, head_size)
            blocks = int(self.blocks.max()) + 1
            room = torch.zeros(blocks, num_kv_heads, 2 * self.block_size, head_size, dtype=dtype)
            work = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(self.lengths),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_size,
                seq_lens=self.lengths,
                dtype=dtype,
                query_start_loc=self.bounds,
                causal=True,
                sliding_window_size=self.window,
                isa=isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            )
            keys, values = room.chunk(2, 2)
            self.kernels[asked] = isa, keys, values, work
        return self.kernels[asked]


def cut(request: int, first: int, end: int, window: int, sink: int) -> list[Piece]:
    """A request's tokens, by their positions; what nothing has left the window of yet is one piece."""
    pieces = []
    while first < end:
        stop = min(end, first + window if first >= window + sink else window + sink)
        pieces.append(Piece(request, first, stop))
        first = stop
    return pieces


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step's tokens."""

    singles: Singles | None
    pieces: Pieces | None


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Cuts a step once for all layers of the same window and sink."""

    supports_update_block_table: bool = True
    kv_cache_spec: SinkWindowSpec

    def __init__(
        self, kv_cache_spec: SinkWindowSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM builds its kernel for tokens that are alone for AVX-512 only, and not for float32.
        self.has_kernel = kv_cache_spec.dtype == torch.bfloat16 and hasattr(torch.ops._C, "decode_attention_cpu")

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        """Cut the step."""
        common, window, sink = common_attn_metadata, self.kv_cache_spec.sliding_window, self.kv_cache_spec.sink
        bounds = common.query_start_loc[: common.num_reqs + 1].numpy().astype(np.int64)
        first, end = bounds[:-1], bounds[1:]
        offset = common.seq_lens[: common.num_reqs].numpy() - end
        alone = (end - first == 1) & self.has_kernel
        singles = pieces = None
        if alone.any():
            request = np.flatnonzero(alone)
            tokens = first[request]
            singles = Singles.of(request, tokens, tokens + offset[request], window, sink)
        if not alone.all():
            starts, ends = (first + offset).tolist(), (end + offset).tolist()
            cuts = [
                piece
                for request in np.flatnonzero(~alone).tolist()
                for piece in cut(request, starts[request], ends[request], window, sink)
            ]
            pieces = Pieces.of(cuts, offset, window, sink) if cuts else None
        return self._found(WindowMetadata(singles, pieces), common.block_table_tensor)

    def update_block_table(
        self, metadata: WindowMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> WindowMetadata:
        """The same for another group of the same layers, whose blocks are others."""
        return self._found(WindowMetadata(copy.copy(metadata.singles), copy.copy(metadata.pieces)), blk_table)

    def _found(self, metadata: WindowMetadata, block_table: torch.Tensor) -> WindowMetadata:
        """Set `slots` by the blocks of the step's requests, `[requests, blocks]`."""
        table, block_size = block_table.numpy(), self.kv_cache_spec.block_size
        for each in (metadata.singles, metadata.pieces):
            if each is not None:
                blocks = table[each.request, np.minimum(each.places // block_size, table.shape[1] - 1)]
                each.slots = torch.from_numpy(blocks * np.int64(block_size) + each.places % block_size)
        return metadata


class WindowImpl(AttentionImpl[WindowMetadata]):
    """Attends in pieces.

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
        singles, pieces = attn_metadata.singles, attn_metadata.pieces
        for part in (singles, pieces):
            if part is None:
                continue
            attend = self._attend_singles if part is singles else self._attend_pieces
            if singles is None or pieces is None:  # the step's tokens, all in their order
                count = len(part.tokens)
                attend(layer, query[:count], rows, part, output[:count])
            else:
                made = torch.empty_like(asked := query[part.tokens])
                attend(layer, asked, rows, part, made)
                output[part.tokens] = made
        return output

    def _attend_singles(
        self, layer: Any, query: torch.Tensor, rows: torch.Tensor, singles: Any, output: torch.Tensor
    ) -> None:
        """`[tokens, num_heads, head_size]`"""
        key, value = rows[..., : self.head_size], rows[..., self.head_size :]
        scores = query.new_empty((len(query), self.num_heads, 1, self.head_size + 1), dtype=torch.float32)
        options = (self.scale, self.logits_soft_cap, False, -1, None, None)
        ops.cpu_mla_decode(
            query, key, value, output, None, None, None, scores, singles.slots, singles.every, singles.count, *options
        )

    def _attend_pieces(
        self, layer: Any, query: torch.Tensor, rows: torch.Tensor, pieces: Any, output: torch.Tensor
    ) -> None:
        """`[tokens, num_heads, head_size]`"""
        isa, keys, values, work = pieces.kernel(self.num_heads, self.num_kv_heads, self.head_size, query.dtype)
        if self.quantized is None:
            key, value = rows.index_select(0, pieces.slots).split(self.head_size, -1)
        else:
            held = rows.view(torch.uint8).index_select(0, pieces.slots).view(self.quantized).to(query.dtype)
            key, value = held.split(self.head_size, -1)
            key, value = key * layer._k_scale_float, value * layer._v_scale_float
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, pieces.packed, isa)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=pieces.bounds,
            seq_lens=pieces.lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=pieces.window,
            block_table=pieces.blocks,
            softcap=self.logits_soft_cap,
            scheduler_metadata=work,
            s_aux=None,
        )


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
