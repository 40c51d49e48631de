"""Items one below the other, as a model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from vllm_ext.tasks.items import Item


@dataclass(frozen=True)
class Batch:
    """Items one below the other, padded on the right, where no row of theirs looks."""

    tokens: torch.Tensor
    """`[batch, length]`"""
    prompts: torch.Tensor
    """`[batch]`: the lengths of the prompts."""
    ends: torch.Tensor
    """`[batch]`: the lengths of prompt and answer."""

    @classmethod
    def of(cls, items: Sequence[Item], device: torch.device) -> Self:
        """Of one or more items."""
        rows = [torch.tensor(item.prompt + item.answer) for item in items]
        return cls(
            nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
            torch.tensor([len(item.prompt) for item in items], device=device),
            torch.tensor([len(row) for row in rows], device=device),
        )

    @property
    def positions(self) -> torch.Tensor:
        """`[length]`"""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def prompt_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows are a prompt's."""
        return self.positions < self.prompts[:, None]

    @property
    def previous_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows are a prompt's, but for its last (arXiv 2409.03621: the previous tokens)."""
        return self.positions < self.prompts[:, None] - 1

    @property
    def answering_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows predict a token of the answer."""
        return (self.positions >= self.prompts[:, None] - 1) & (self.positions < self.ends[:, None] - 1)
