"""Refuses `prompt_logprobs` for plans with frozen layers, request by request.

Prompt tokens end at the first frozen layer, so no logits exist for them. vLLM asks every logits processor whether it
accepts a request's parameters, at admission, before the request reaches the engine. Its two model runners ask two
classes, so this is a subclass of both, and neither ever calls it with logits that it would change.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2


class RefusePromptLogprobs(LogitsProcessorV1, LogitsProcessorV2):
    """Leaves logits as they are."""

    def __init__(self, *args: Any) -> None:
        """Nothing is kept, whichever runner makes it."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise VLLMValidationError, HTTP status 400, where prompt log-probabilities are asked for."""
        for parameter in ("prompt_logprobs", "prompt_logprob_token_ids"):
            value = getattr(sampling_params, parameter)
            if value is not None:
                raise VLLMValidationError(
                    f"{parameter} (or echo with logprobs) cannot be answered by this model: its attention plan freezes "
                    "prompt tokens below the head; leave it out or ask the stock model",
                    parameter=parameter,
                    value=value,
                )

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """`[num_rows, vocab_size]`, unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """V1: greedy requests do not even call `apply`."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: nothing is kept."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: no request's logits are changed."""
        return False
