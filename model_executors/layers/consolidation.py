"""What a skipped layer adds in place of its attention (arXiv 2409.03621, section 5: *skip*)."""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from model_executors.attention_plan import LayerPlan


class Consolidation(nn.Module):
    """Stands where a skipped layer's attention stood: adds nothing, a constant vector, or a linear map of its input.

    The maps are split over tensor-parallel ranks, as the attention was: a full one along its input, a low-rank one
    along its rank. Where the layer adds up the ranks' outputs itself (not `reduced`), each rank gives its share.
    """

    def __init__(self, hidden_size: int, plan: LayerPlan, reduced: bool, prefix: str) -> None:
        super().__init__()
        self.adds_bias = reduced or get_tensor_model_parallel_rank() == 0
        self.bias: nn.Parameter | None = None
        self.down: ColumnParallelLinear | None = None
        self.up: RowParallelLinear | None = None
        if plan.consolidation != "none":
            self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        if plan.consolidation == "linear":
            if plan.rank is not None:
                self.down = ColumnParallelLinear(hidden_size, plan.rank, bias=False, prefix=f"{prefix}.down")
            self.up = RowParallelLinear(
                plan.rank or hidden_size,
                hidden_size,
                bias=False,
                input_is_parallel=plan.rank is not None,
                reduce_results=reduced,
                prefix=f"{prefix}.up",
            )

    @property
    def fitted(self) -> dict[str, Any]:
        """The parameters by the names that fitted tensors have in a checkpoint."""
        if self.up is None:
            return {} if self.bias is None else {"bias": self.bias}
        if self.down is None:
            return {"weight": self.up.weight, "bias": self.bias}
        return {"down": self.down.weight, "up": self.up.weight, "bias": self.bias}

    def forward(self, positions: object, hidden_states: torch.Tensor, **unused: object) -> torch.Tensor:
        """`[num_tokens, hidden_size]`, what the attention would have read, to what is added in its place."""
        bias = self.bias if self.adds_bias else None
        if self.up is None:
            # A tensor of its own: the norm that follows may write into it. Not as zeros and a bias, of which Inductor
            # would make the bias alone, and fail over the rows' unknown number.
            return torch.zeros_like(hidden_states) if bias is None else bias.repeat(len(hidden_states), 1)
        entering = hidden_states if self.down is None else self.down(hidden_states)[0]
        added = self.up(entering)[0]
        return added if bias is None else added + bias
