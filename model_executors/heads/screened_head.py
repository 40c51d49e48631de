"""The screened head: a quantized copy of the stock head ranks the tokens, and its exact rows score the best of them."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from model_executors.heads.exact_rows import exact_scores, require_weight
from model_executors.heads.head_metrics import HeadMetrics
from model_executors.heads.head_plan import GROUP, HeadPlan
from model_executors.hooks.full_vocabulary import PLACE

INT4_MAX = 7
MOST_ROWS = 4
"""With more rows at once the packed kernel is slower than the stock head, which is asked instead."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[vocab_size, hidden_size]` to whole numbers from -7 to 7, and the scale of each group of them,
    `[vocab_size, hidden_size / GROUP]` in bfloat16.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / INT4_MAX).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()
    return (groups / scales.float()[..., None]).round().clamp(-INT4_MAX, INT4_MAX).flatten(1).int(), scales


class Int4Copy(nn.Module):
    """The product with an INT4 copy of a weight, through torch's own packed kernel for CPUs."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        numbers, scales = quantize(weight)
        pairs = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
        # The kernel's numbers run from 0 to 15, and stand for those less 8.
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers + 8, 1), False)
        self.register_buffer("scales", pairs, False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` to `[rows, vocab_size]`, in float32."""
        rows = hidden_states.bfloat16().contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales).float()


def screened_scores(
    approximate: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, shortlist: int
) -> torch.Tensor:
    """Put the exact scores of each row's `shortlist` best tokens into `approximate`, `[rows, vocab_size]` in float32.

    `hidden_states` is `[rows, hidden_size]`, `weight` `[vocab_size, hidden_size]`; products are taken in float32. What
    is not on a row's list is kept below all that is, so that the best tokens are exact ones.
    """
    if shortlist >= approximate.shape[1]:
        return hidden_states.float() @ weight.float().T
    tokens = approximate.topk(shortlist, sorted=False).indices
    exact = exact_scores(hidden_states, weight, tokens)
    lowest = exact.amin(1, keepdim=True)
    return torch.minimum(approximate, lowest).scatter_(1, tokens, exact)


class ScreenedMethod(UnquantizedEmbeddingMethod):
    """How a head computes logits: as the stock one, or screened where that is exact enough for the batch.

    Each tensor-parallel rank screens its own part of the vocabulary. vLLM asks it to prepare once weights are loaded.
    """

    def __init__(self, shortlist: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.shortlist = shortlist
        self.forward_context = vllm_config.compilation_config.static_forward_context
        self.metrics = HeadMetrics(str(vllm_config.model_config.served_model_name))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize a copy of the weight, `[vocab_size of this rank, hidden_size]`."""
        super().process_weights_after_loading(layer)
        layer.screen = Int4Copy(layer.weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[rows, hidden_size]` to `[rows, vocab_size]`: in float32 where it is screened."""
        watch = self.forward_context.get(PLACE)
        screened = len(x) <= MOST_ROWS and bias is None and watch is not None and not watch.rows
        with self.metrics.timed(len(x) if screened else 0, 0 if screened else len(x)):
            if not screened:
                return super().apply(layer, x, bias)
            approximate = layer.screen(x)
            approximate[:, layer.shard_indices.num_org_elements :] = -torch.inf  # vLLM pads the vocabulary
            return screened_scores(approximate, x, layer.weight, self.shortlist)


def screen(head: Any, vllm_config: VllmConfig) -> None:
    """Screen a stock head, where the model's configuration asks for it.

    Raises:
        ValueError: for a head that is quantized already, or not the model's own.

    """
    plan = HeadPlan.from_hf_config(vllm_config.model_config.hf_config)
    if plan.kind != "screened":
        return
    require_weight(head, "screened")
    if head.embedding_dim % GROUP:
        raise ValueError(f"--head screened: hidden_size {head.embedding_dim} is no multiple of {GROUP}; drop it")
    head.quant_method = ScreenedMethod(plan.shortlist, vllm_config)
