"""What engines and references answer, so that they can be compared."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and the log-probability of each prompt token after the first."""

    tokens: list[int]
    prompt_logprobs: list[float]


def assert_same(ours: list[Answer], theirs: list[Answer], tolerance: float = 2e-4) -> None:
    """The same tokens, and log-probabilities within float32's reach."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=tolerance)
