"""What engines and references answer, so that they can be compared."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Answer:
    """A greedy answer with its tokens' log-probabilities, and those of each prompt token after the first."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def assert_same(
    ours: list[Answer], theirs: list[Answer], tolerance: float = 2e-4, *, prompt_logprobs: bool = True
) -> None:
    """The same tokens, and log-probabilities within float32's reach."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)
        if prompt_logprobs:
            assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=tolerance)
