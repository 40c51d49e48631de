"""Items one below the other, as a model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from vllm_ext.tasks.items import Item


@dataclass(frozen=True)
class Batch:
    """Items one below the other, padded on the right, where no row of theirs looks.

    Or one text with what several items go on with behind it in the same row, each as if it followed the text alone.
    """

    tokens: torch.Tensor
    """`[batch, length]`"""
    starts: torch.Tensor
    """`[items]`: where what only that item has begins."""
    prompts: torch.Tensor
    """`[items]`: where the prompts end."""
    ends: torch.Tensor
    """`[items]`: where the answers end."""
    text: int = 0
    """Tokens that all items begin with, of those that are in one row."""

    @classmethod
    def of(cls, items: Sequence[Item], device: torch.device) -> Self:
        """Of one or more items."""
        rows = [torch.tensor(item.prompt + item.answer) for item in items]
        return cls(
            nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device),
            torch.zeros(len(rows), dtype=torch.long, device=device),
            torch.tensor([len(item.prompt) for item in items], device=device),
            torch.tensor([len(row) for row in rows], device=device),
        )

    @classmethod
    def of_text(cls, items: Sequence[Item], text: int, device: torch.device) -> Self:
        """Of items whose prompts have the first `text` tokens in common, and more of their own each."""
        own = [item.prompt[text:] + item.answer for item in items]
        sizes = torch.tensor([len(each) for each in own])
        ends = text + sizes.cumsum(0)
        starts = ends - sizes
        tokens = torch.tensor([[*items[0].prompt[:text], *(token for each in own for token in each)]])
        prompts = starts + torch.tensor([len(item.prompt) - text for item in items])
        return cls(tokens.to(device), starts.to(device), prompts.to(device), ends.to(device), text)

    @property
    def settings(self) -> dict[str, Any]:
        """What a decoder has to know of it: nothing where each item has a row of its own."""
        if not self.text:
            return {}
        behind = self._places.clone()
        for start, end in self.forks:
            behind[start:end] -= start - self.text
        return {"position_ids": behind[None], "forks": self.forks}

    @property
    def forks(self) -> tuple[tuple[int, int], ...]:
        """Where each item's own tokens begin and end, of items that are in one row."""
        return tuple(zip(self.starts.tolist(), self.ends.tolist(), strict=True)) if self.text else ()

    @property
    def sizes(self) -> list[int]:
        """Tokens of each answer."""
        return (self.ends - self.prompts).tolist()

    @property
    def prompt_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows are a prompt's."""
        return self._rows(self._own & (self._places < self.prompts[:, None]))

    @property
    def previous_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows are a prompt's, but for its last (arXiv 2409.03621: the previous tokens)."""
        return self._rows(self._own & (self._places < self.prompts[:, None] - 1))

    @property
    def answering_rows(self) -> torch.Tensor:
        """`[batch, length]`: which rows predict a token of the answer."""
        return self._rows((self._places >= self.prompts[:, None] - 1) & (self._places < self.ends[:, None] - 1))

    @property
    def _places(self) -> torch.Tensor:
        """`[length]`"""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def _own(self) -> torch.Tensor:
        """`[items, length]`: not another item's."""
        return (self._places >= self.starts[:, None]) | (self._places < self.text)

    def _rows(self, rows: torch.Tensor) -> torch.Tensor:
        """From those of each item, `[items, length]`, to those of the batch."""
        return rows.any(0, keepdim=True) if self.text else rows
