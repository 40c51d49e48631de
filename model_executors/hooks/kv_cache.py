"""The KV cache of window layers: the blocks of the first tokens, the *sink*, and those of the window; none between.

vLLM's managers of sliding windows give back what is behind the window. Ours does too, in prefill and in decode, but for
the sink's blocks; and a prefix is found again only where both the sink's blocks and the window's are still there.

vLLM takes a spec of our own through its registry. The registration is made where this module is imported, which
unpickling a spec does too, so that every process of an engine has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from model_executors.names import SCHEDULER


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window of `sliding_window` tokens, and the first `sink` tokens of all.

    Groups of the KV cache hold equally many layers, those of one spec each, and what is missing in a group is padding:
    memory that is given to no layer. So plans with few distinct pairs of window and sink, on layers whose numbers
    divide each other, waste the least; `vllm_ext.costs` counts it.
    """

    sink: int
    in_flight_tokens: int
    """The most tokens of one request that are scheduled and not settled, whose blocks are not given back yet."""

    @classmethod
    def of(cls, window: SlidingWindowSpec, sink: int, vllm_config: VllmConfig) -> Self:
        """What vLLM would have for the window alone, with the sink."""
        settings = {field.name: getattr(window, field.name) for field in fields(window)}
        return cls(**settings, sink=sink, in_flight_tokens=in_flight_tokens(vllm_config))

    @property
    def sink_blocks(self) -> int:
        """How many blocks hold the sink."""
        return cdiv(self.sink, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """What a request holds at most: the sink, the window before the tokens in flight, those, and one block more,
        since a window need not start where a block does; never more than all of its tokens.
        """
        window = self.sliding_window - 1 + self.extra_retained_tokens + self.in_flight_tokens
        return min(self.sink_blocks + cdiv(window, self.block_size) + 1, cdiv(max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether one block table serves all of them."""
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.sliding_window, spec.sink) == (self.sliding_window, self.sink)
            for spec in kv_cache_specs.values()
        )


def in_flight_tokens(vllm_config: VllmConfig) -> int:
    """The most tokens of one request that are scheduled and not settled: those of each batch under way.

    A step takes `long_prefill_token_threshold` tokens of a request at most where the scheduler is ours, and leaves room
    for those that are speculated.
    """
    scheduler = vllm_config.scheduler_config
    bound = scheduler.long_prefill_token_threshold if scheduler.scheduler_cls == SCHEDULER else 0
    most = min(bound or scheduler.max_num_batched_tokens, scheduler.max_num_batched_tokens)
    return vllm_config.max_concurrent_batches * most + vllm_config.num_speculative_tokens


class SinkWindowManager(SlidingWindowManager):
    """Keeps the sink's blocks as long as the request lives."""

    kv_cache_spec: SinkWindowSpec

    @property
    def sink_blocks(self) -> int:
        """How many of a request's blocks, from the first on, stay."""
        return self.kv_cache_spec.sink_blocks

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """Every block that is given back while a request lives goes this way."""
        super()._remove_blocks_in_range(request_id, max(first_block, self.sink_blocks), last_block)

    def _kept(self, computed_blocks: Sequence[KVCacheBlock], num_computed_tokens: int) -> Sequence[KVCacheBlock]:
        """Of a prefix that was found, the sink's blocks that vLLM would leave out as behind the window."""
        skipped = self.get_num_skipped_tokens(num_computed_tokens) // self.block_size
        return computed_blocks[: min(self.sink_blocks, skipped)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **settings: Any,
    ) -> int:
        """The sink's blocks of a prefix that was found are taken from the free ones too."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **settings
        )
        return needed + self._get_num_evictable_blocks(self._kept(new_computed_blocks, total_computed_tokens))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the sink's blocks of a prefix that was found, beside the window's."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        kept = self._kept(new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens)
        self.block_pool.touch(kept)
        self.req_to_blocks[request_id][: len(kept)] = kept

    @classmethod
    def find_longest_cache_hit(  # type: ignore[override]  # named arguments only, as vLLM calls it
        cls,
        *,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: SinkWindowSpec,
        alignment_tokens: int,
        **settings: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose window and whose sink are still there."""
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        sink: list[list[KVCacheBlock]] = []
        for block_hash in islice(hashes, kv_cache_spec.sink_blocks):
            cached = block_pool.get_cached_block(block_hash, kv_cache_group_ids)
            if not cached:  # of a longer prefix, the sink would be missing
                max_length = min(max_length, len(sink) * kv_cache_spec.block_size)
                break
            sink.append(cached)
        found, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            alignment_tokens=alignment_tokens,
            **settings,
        )
        for group, blocks in enumerate(found):
            for number, cached in enumerate(sink[: len(blocks)]):
                blocks[number] = cached[group]
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **settings: Any,
    ) -> list[bool] | None:
        """Which blocks can serve a hit, and so are kept in the prefix cache: the sink's always."""
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **settings)
        if mask is not None:
            for number in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[number - start_block] = True
        return mask


# vLLM registers its own with the first look into its registry, and only where nothing is registered yet.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, SinkWindowSpec)
