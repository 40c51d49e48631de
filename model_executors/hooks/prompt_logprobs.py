"""Refuses `prompt_logprobs` for plans with frozen layers, request by request.

Prompt tokens end at the first frozen layer, so no logits exist for them. vLLM asks every logits processor whether it
accepts a request's parameters, before the request reaches the engine.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class RefusePromptLogprobs(LogitsProcessor):
    """Leaves logits as they are."""

    def __init__(self, *args: Any) -> None:
        """Nothing is kept."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise VLLMValidationError, HTTP status 400, where prompt log-probabilities are asked for."""
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "prompt_logprobs (or echo with logprobs) cannot be answered by this model: its attention plan freezes "
                "prompt tokens below the head; leave it out or ask the stock model",
                parameter="prompt_logprobs",
                value=sampling_params.prompt_logprobs,
            )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`[num_rows, vocab_size]`, unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """So that greedy requests do not even call `apply`."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing is kept."""
