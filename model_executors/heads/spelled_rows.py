"""What character heads made of a step's rows, for the proposer of longer strings, which vLLM hands no states."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch


@dataclass
class SpelledRows:
    """Of the step that runs. Its rows are, request after request, one for each draft and one for the token after it."""

    ends: torch.Tensor | None = None
    """`[requests]`: how many tokens of each request have been through the model, with this step's, drafts too."""
    places: torch.Tensor | None = None
    """`[rows, slots]`: each place's log-probabilities."""

    def begin(self, ends: torch.Tensor | None) -> None:
        """A step begins."""
        self.ends, self.places = ends, None

    def keep(self, places: torch.Tensor) -> None:
        """Keep a step's first rows of logits; what it makes after those is of prompt tokens, for their own sake."""
        if self.places is None:
            self.places = places

    def last(self, sampled: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which requests got tokens, and the row that the last of each came from; none where rows do not add up.

        `sampled` are each request's tokens of this step, and `lengths` how many it has with them. Of the tokens that
        went through the model, those beyond what a request had before the step were drafts.
        """
        if self.ends is None or self.places is None:
            return [], []
        requests, rows, first = [], [], 0
        for request, (new, length, end) in enumerate(zip(sampled, lengths, self.ends.tolist(), strict=False)):
            if new:
                requests.append(request)
                rows.append(first + len(new) - 1)
            first += 1 + max(0, end - (length - len(new)))
        return (requests, rows) if first == len(self.places) else ([], [])


@cache
def spelled_rows(instance_id: str) -> SpelledRows:
    """Of the engine with that id, in this process."""
    return SpelledRows()
