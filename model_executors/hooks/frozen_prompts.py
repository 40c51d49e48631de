"""What frozen layers need of vLLM's logits processors, of either model runner: a subclass of both that changes nothing.

Prompt tokens end at the first frozen layer, so no logits exist for them. vLLM asks every logits processor whether it
accepts a request's parameters, at admission, before the request reaches the engine: `prompt_logprobs` is refused there.

And Model Runner V2 hands its processors where prompts end. After a preemption it calls generated tokens prompt tokens
too, when they are computed anew, so frozen layers look here which of them are the prompt's.
"""

from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

PLACE = "vllm_ext.frozen_prompts"
"""Its name among what vLLM finds by name in an engine's steps, under V2."""


class FrozenPrompts(LogitsProcessorV1, LogitsProcessorV2):
    """Leaves logits as they are."""

    def __init__(self, vllm_config: VllmConfig, *state: Any) -> None:
        """`state` is V2's of all requests, or V1's device and whether memory is pinned."""
        if len(state) == 1:
            self.prompt_len = state[0].prompt_len
            vllm_config.compilation_config.static_forward_context[PLACE] = self

    def lengths(self, requests: np.ndarray) -> torch.Tensor:
        """Tokens of their prompts, by the requests' numbers in V2's table; both `[num_reqs]`, on the CPU."""
        return torch.from_numpy(self.prompt_len.np[requests])

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
