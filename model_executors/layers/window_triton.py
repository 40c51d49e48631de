"""Window layers' attention on a GPU: to the first `sink` tokens and the last `window`, each once.

vLLM's Triton kernel has the mask already: under the name R-SWA a query sees a prefix of its request or what lies in its
window. It reads every tile of a request for it, though. So a request is handed to it shortened: without the blocks
between the sink's and those of the window, which are given back anyway. Places after these blocks, the queries' own
too, move down by as many whole blocks, so that what is within a window stays within it; and as a window then begins
after the sink's blocks, nothing else of these is within it. All of it is computed on the device, into tensors that stay
where they are, so that a step waits for nothing and full graphs hold.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from model_executors.hooks.kv_cache import SinkWindowSpec


def shortened(
    block_table: torch.Tensor, seq_lens: torch.Tensor, first: torch.Tensor, window: int, sink_blocks: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block tables `[requests, blocks]` and lengths `[requests]` of requests without what lies between.

    `first` `[requests]` is where the step's first token of each request is, and `size` the tokens of a block.
    """
    left_out = ((first - window + 1) // size - sink_blocks).clamp(min=0)
    number = torch.arange(block_table.shape[1], device=block_table.device)
    source = number + torch.where(number < sink_blocks, 0, left_out.unsqueeze(1))
    return block_table.gather(1, source.clamp(max=block_table.shape[1] - 1)), seq_lens - left_out * size


class WindowMetadataBuilder(TritonAttentionMetadataBuilder):
    """vLLM's, for shortened requests."""

    kv_cache_spec: SinkWindowSpec

    def __init__(
        self, kv_cache_spec: SinkWindowSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False  # what is shortened depends on the step
        requests = vllm_config.scheduler_config.max_num_seqs
        self.seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self.sinks = torch.full((requests,), kv_cache_spec.sink, dtype=torch.int32, device=device)
        self.block_table: torch.Tensor | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """As vLLM's."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        requests, table = common_attn_metadata.num_reqs, metadata.block_table
        if self.block_table is None or self.block_table.shape[1] != table.shape[1]:
            self.block_table = table.new_zeros(len(self.seq_lens), table.shape[1])
        bounds = metadata.query_start_loc[: requests + 1]
        lengths, spec = metadata.seq_lens[:requests], self.kv_cache_spec
        kept = self.block_table[:requests], self.seq_lens[:requests]
        window = spec.sliding_window, spec.sink_blocks, spec.block_size
        found = shortened(table[:requests], lengths, lengths - bounds.diff(), *window)
        for buffer, made in zip(kept, found, strict=True):
            buffer.copy_(made)
        metadata.block_table, metadata.seq_lens = kept
        metadata.rswa_prefix_lens, metadata.rswa_window = self.sinks[:requests], spec.sliding_window
        return metadata


class WindowImpl(TritonAttentionImpl):
    """vLLM's, which is told of the window by the metadata alone: beside R-SWA's mask its own would drop the sink."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.sliding_window = (-1, -1)


class WindowBackend(TritonAttentionBackend):
    """vLLM's Triton backend with both; it keeps the name, by which vLLM looks backends up."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """What attends."""
        return WindowImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """What prepares a step."""
        return WindowMetadataBuilder
