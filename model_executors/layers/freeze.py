"""Frozen layers: prompt tokens stop at the first of them (arXiv 2409.03621, section 5: *freeze*).

In the paper, the states of the prompt's tokens above layer k are those that entered it. So K and V of prompt tokens, in
every frozen layer, follow from one state, and prompt tokens need no other work up there. Generated tokens flow through
all layers, and so does the last prompt token's query, for it is sampled from; but what it leaves in the KV cache is
frozen like the rest of the prompt, so that answers do not depend on where chunks of a prompt end.

A step without prompt tokens runs the layers as they are. A step with some runs them on the rows that go on: all rows of
requests that generate, and the last row of those that are still prefilled. The attention's metadata are made for those
rows by a metadata builder of our own, which is vLLM's extension point for this.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import subclass_attention_backend

from model_executors.families import Family
from model_executors.hooks.frozen_prompts import PLACE
from model_executors.layers.stream import DeferredLayers, normed


@dataclass(frozen=True)
class Rows:
    """The rows of a step that go on above the first frozen layer."""

    index: torch.Tensor
    """`[num_rows]`, which of the step's tokens they are."""
    generating: torch.Tensor
    """`[num_rows, 1]`, whether the row's own K and V go into the cache, or the frozen ones."""


def select_rows(query_start_loc: torch.Tensor, is_prefilling: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """The rows that go on, and their `query_start_loc` `[num_reqs + 1]`.

    `query_start_loc` `[num_reqs + 1]` are the requests' bounds, and `is_prefilling` `[num_reqs]` says which of them
    are still in their prompt; both on the CPU.
    """
    first, end = query_start_loc[:-1], query_start_loc[1:]
    first = torch.where(is_prefilling, end - 1, first)
    count = end - first
    bounds = torch.zeros_like(query_start_loc)
    torch.cumsum(count, 0, out=bounds[1:])
    index = torch.repeat_interleave(first - bounds[:-1], count) + torch.arange(int(bounds[-1]))
    return Rows(index, torch.repeat_interleave(~is_prefilling, count).unsqueeze(1)), bounds


def in_prompt(common: CommonAttentionMetadata, vllm_config: VllmConfig) -> torch.Tensor | None:
    """Which requests `[num_reqs]` are still in their prompt, on the CPU; None where it is unknown, as in dummy steps.

    Of Model Runner V2 the prompts' ends are asked, since there a preempted request's own tokens pass for prompt tokens.
    """
    prompts = vllm_config.compilation_config.static_forward_context.get(PLACE)
    if prompts is None or common.req_idx is None or common.seq_lens_cpu_upper_bound is None:
        return common.is_prefilling
    query_lens = common.query_start_loc_cpu.diff()
    computed = common.seq_lens_cpu_upper_bound[: len(query_lens)] - query_lens
    return computed < prompts.lengths(common.req_idx)


@functools.cache
def frozen_backend(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend with metadata for the rows that go on.

    Raises:
        ValueError: for a backend that writes the KV cache while it attends, since here more is written than attends.

    """
    if stock.forward_includes_kv_cache_update:
        raise ValueError(f"frozen layers do not work with attention backend {stock.get_name()}; choose another")
    stock_builder: Any = stock.get_builder_cls()

    class FrozenMetadataBuilder(stock_builder):  # type: ignore[misc]
        # Which layers a step runs is decided outside of the graphs, so a whole step is never captured as one.
        _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
        supports_update_block_table = False  # which would be given the slots of all rows

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> AttentionMetadata:
            common = common_attn_metadata
            is_prefilling = in_prompt(common, self.vllm_config)
            if is_prefilling is None or not is_prefilling.any():
                return super().build(common_prefix_len, common, fast_build)
            rows, bounds = select_rows(common.query_start_loc_cpu, is_prefilling)
            device = common.query_start_loc.device
            rows = Rows(*(part.to(device, non_blocking=True) for part in (rows.index, rows.generating)))
            selected = common.replace(
                query_start_loc=bounds.to(device, non_blocking=True),
                query_start_loc_cpu=bounds,
                num_actual_tokens=int(bounds[-1]),
                max_query_len=int(bounds.diff().max()),
                slot_mapping=common.slot_mapping[rows.index],
                positions=None if common.positions is None else common.positions[rows.index],
            )
            metadata = super().build(0, selected, fast_build)
            metadata.rows = rows
            return metadata

    builder: type[AttentionMetadataBuilder] = FrozenMetadataBuilder
    return subclass_attention_backend("Frozen", stock, builder)


class FrozenPositions(NamedTuple):
    """What a frozen layer's attention is given for positions in a step with prompt tokens.

    A layer hands its positions to its attention untouched, whatever its family.
    """

    selected: torch.Tensor
    """`[num_rows]`, the positions of the rows that go on."""
    every: torch.Tensor
    """`[num_tokens]`, the positions of all tokens."""
    frozen: torch.Tensor
    """`[num_tokens, hidden_size]`, the state that entered the first frozen layer, through this layer's norm."""
    rows: torch.Tensor
    generating: torch.Tensor


class _QueryKeyValue(nn.Module):
    """In place of an attention's kernel: hands on what that was given."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return query, key, value


class _Nothing(nn.Module):
    """In place of an attention's output projection: changes nothing."""

    def forward(self, output: Any) -> tuple[Any, None]:
        return output, None


class KeyValueProjection(nn.Module):
    """In place of an attention's merged projection, for tokens that are not asked with: makes K and V alone.

    Its weight is a part of the merged one's. Where vLLM packs weights once they are loaded, as on a CPU, it packs these
    too, and so keeps a copy; elsewhere they are the same bytes.
    """

    def __init__(self, merged: QKVParallelLinear) -> None:
        super().__init__()
        self.query_size = merged.num_heads * merged.head_size
        self.merged = (merged,)
        self.quant_method = merged.quant_method  # vLLM's word to have a module's weights packed
        whole: Any = merged.weight
        self.weight = nn.Parameter(whole.data[self.query_size :], requires_grad=False)

    @classmethod
    def of(cls, stock: nn.Module) -> dict[str, Self]:
        """By the merged projection's name in the attention; none where that is quantized, or there is none."""
        return {
            name: cls(module)
            for name, module in stock.named_children()
            if isinstance(module, QKVParallelLinear)
            and isinstance(module.quant_method, UnquantizedLinearMethod)
            and not module.skip_bias_add
        }

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[num_tokens, hidden_size]` to what the merged projection gives, with zeros for Q."""
        bias: Any = self.merged[0].bias
        bias = None if bias is None else bias[self.query_size :]
        made = self.quant_method.apply(self, hidden_states, bias)
        return torch.cat((made.new_zeros(len(made), self.query_size), made), 1), None


class FrozenAttention(nn.Module):
    """Takes an attention module's place, and holds its modules under their names, so that weights load as usual."""

    def __init__(self, stock: nn.Module, family: Family) -> None:
        super().__init__()
        for name, module in stock.named_children():
            self.add_module(name, module)
        self.out_proj = family.out_proj
        # The family's own code up to the kernel: projections, norms, rotation. In tuples, or torch would list their
        # parameters a second time.
        projections = copy.copy(stock)
        projections._modules = stock._modules | {"attn": _QueryKeyValue(), family.out_proj: _Nothing()}
        self.frozen_proj = nn.ModuleDict(KeyValueProjection.of(stock))
        of_frozen = copy.copy(projections)
        of_frozen._modules = {**projections._modules, **self.frozen_proj._modules}
        self.attn: Attention
        self.stock = (stock,)
        self.projections = (projections, of_frozen)

    def forward(
        self, positions: torch.Tensor | FrozenPositions, hidden_states: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """`[num_tokens, hidden_size]` to the same; with `FrozenPositions`, `[num_rows, hidden_size]`."""
        if not isinstance(positions, FrozenPositions):
            return self.stock[0](positions=positions, hidden_states=hidden_states, **kwargs)
        project, project_frozen = self.projections
        query, own_key, own_value = project(positions=positions.selected, hidden_states=hidden_states, **kwargs)
        _, key, value = project_frozen(positions=positions.every, hidden_states=positions.frozen, **kwargs)
        key, value = (
            every.index_copy(0, positions.rows, torch.where(positions.generating, own, every[positions.rows]))
            for every, own in ((key, own_key), (value, own_value))
        )
        return getattr(self, self.out_proj)(attend(self.attn, query, key, value))[0]


def attend(attn: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Write all tokens' K and V `[num_tokens, num_kv_heads * head_size]` and attend with the rows that go on,
    `[num_rows, num_heads * head_size]`.
    """
    name = _encode_layer_name(attn.layer_name)
    query = query.view(-1, attn.num_heads, attn.head_size)
    key = key.view(-1, attn.num_kv_heads, attn.head_size)
    value = value.view(-1, attn.num_kv_heads, attn.head_size_v)
    output = query.new_empty((query.shape[0], attn.num_heads, attn.head_size_v))
    written = torch.ops.vllm.unified_kv_cache_update(key, value, name)
    torch.ops.vllm.unified_attention_with_output(query, key, value, output, name, kv_cache_dummy_dep=written)
    return output.flatten(1)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class Upper(DeferredLayers):
    """The layers from the first frozen one up to the tail, as they are, and what follows them."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` and `[num_tokens, hidden_size]`, to what leaves the last attending layer."""
        return self.run([positions] * len(self.parts[0]), hidden_states)


@support_torch_compile(
    dynamic_arg_dims={"positions": 0, "hidden_states": 0, "index": 0, "generating": 0},
    mark_unbacked_dims={"index": 0, "generating": 0},
)
class FrozenUpper(DeferredLayers):
    """The same layers in a step with prompt tokens."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, index: torch.Tensor, generating: torch.Tensor
    ) -> torch.Tensor:
        """As `Upper`'s, for the rows `index` alone: `[num_rows, hidden_size]`."""
        selected = positions[index]
        given: list[torch.Tensor | FrozenPositions] = []
        for layer in self.parts[0]:
            if not isinstance(getattr(layer, self.family.attention), FrozenAttention):
                given.append(selected)
                continue
            norm = self.family.input_norm
            frozen = hidden_states if norm is None else normed(getattr(layer, norm), hidden_states)
            given.append(FrozenPositions(selected, positions, frozen, index, generating))
        return self.run(given, hidden_states[index])


class Freeze:
    """Runs the layers from the first frozen one up to the tail, in whichever of the two ways a step needs."""

    def __init__(self, vllm_config: VllmConfig, layers: Sequence[nn.Module], norm: nn.Module, family: Family) -> None:
        with set_model_tag("upper"):
            self.upper = Upper(vllm_config=vllm_config, layers=layers, norm=norm, family=family)
        with set_model_tag("frozen"):
            self.frozen = FrozenUpper(vllm_config=vllm_config, layers=layers, norm=norm, family=family)
        self.entering = entering_buffer(vllm_config, next(layers[0].parameters()).device)
        self.layer_name = getattr(layers[0], family.attention).attn.layer_name

    def __call__(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` and `[num_tokens, hidden_size]`, the stream that enters the first frozen layer, to what leaves
        the last attending one. Rows that do not go on are not a number: nothing may read them.
        """
        context = get_forward_context()
        metadata = context.attn_metadata
        if not isinstance(metadata, dict):  # both ways are compiled now, or the first prompt would wait for it
            half = torch.arange(max(1, positions.shape[0] // 2), device=positions.device)
            rows: Rows | None = Rows(half, torch.ones_like(half, dtype=torch.bool).unsqueeze(1))
        else:
            rows = getattr(metadata[self.layer_name], "rows", None)
        if rows is not None:
            # The graphs are captured by the step's number of tokens, which is not the number of rows here.
            with override_forward_context(replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE)):
                selected = self.frozen(positions, hidden_states, rows.index, rows.generating)
            if isinstance(metadata, dict):
                return torch.full_like(hidden_states, torch.nan).index_copy_(0, rows.index, selected)
        if self.entering is not None:
            hidden_states = self.entering[: len(hidden_states)].copy_(hidden_states)
        return self.upper(positions, hidden_states)


def entering_buffer(vllm_config: VllmConfig, device: torch.device) -> torch.Tensor | None:
    """`[max_num_batched_tokens, hidden_size]`: where the graphs of the upper layers read what enters them; None without
    graphs.

    vLLM lets go of what a model's last graph returns, so the graphs that are captured next, those of the upper layers,
    would be given the same memory, and overwrite what they still have to read. vLLM's `gemma3n.py` says so of its own
    two parts, and copies. On a CPU, with graphs as `tests/graphs.py` has them, the answers of frozen layers have NaN
    without it. On a GPU, where they were garbage before, it was not tried.
    """
    if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
        return None
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    shape = (vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.get_hidden_size())
    return torch.zeros(shape, dtype=dtype, device=device)
