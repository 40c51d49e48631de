"""Exact scores, in float32, of a few tokens of each row: they decide among tokens that something cheaper chose."""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


def require_weight(head: Any, kind: str) -> None:
    """Raise ValueError unless the stock head has a plain weight, whose rows can be read one by one."""
    if type(getattr(head, "quant_method", None)) is not UnquantizedEmbeddingMethod:
        raise ValueError(f"--head {kind}: the model's head is quantized, or none whose rows can be read; drop it")


def exact_scores(hidden_states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`[rows, hidden_size]`, `[vocab_size, hidden_size]` and `[rows, k]` to `[rows, k]`."""
    rows = weight.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).float()
    return torch.bmm(rows, hidden_states.float()[:, :, None])[:, :, 0]


class ExactRows(nn.Module):
    """The stock head's logits of some tokens; each tensor-parallel rank has a part of the vocabulary."""

    def __init__(self, head: Any, processor: Any) -> None:
        """`head` is the model's, and `processor` the `LogitsProcessor` that its logits pass.

        Raises:
            ValueError: for a head that is quantized, or not the model's own.

        """
        super().__init__()
        require_weight(head, "rescored")
        self.parts = (head, processor)  # in a tuple, since they are another module's

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` and `[rows, k]` to `[rows, k]`, in float32, on every rank."""
        head, processor = self.parts
        part = head.shard_indices
        local = tokens - part.org_vocab_start_index
        own = local.clamp(0, part.num_org_elements - 1)
        scores = exact_scores(hidden_states, head.weight, own)
        if (bias := getattr(head, "bias", None)) is not None:
            scores = scores + bias[own]
        if get_tensor_model_parallel_world_size() > 1:
            scores = tensor_model_parallel_all_reduce(scores.where(local == own, 0.0))
        if processor.soft_cap is not None:
            scores = torch.tanh(scores / processor.soft_cap) * processor.soft_cap
        return scores * processor.scale
