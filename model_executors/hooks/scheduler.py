"""vLLM's scheduler with one rule more, for plans with frozen layers.

A step never takes both the end of a request's prompt and tokens that were generated after it. They come together only
when a preempted request is computed anew; then the prompt's tokens are frozen again, and the generated ones flow
through all layers again, so that preemption does not change the answer.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class _PromptBoundary:
    """Mixin before a scheduler class."""

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on how many tokens a request gets in a step."""
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        prompt_left = request.num_prompt_tokens - num_computed_tokens
        return min(num_new_tokens, prompt_left) if prompt_left > 0 else num_new_tokens


class _PromptBoundaryScheduler(_PromptBoundary, Scheduler):
    """For synchronous scheduling."""


class _PromptBoundaryAsyncScheduler(_PromptBoundary, AsyncScheduler):
    """For asynchronous scheduling."""


def prompt_boundary_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """Make the one that the configuration asks for: whether it schedules asynchronously is settled late."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (_PromptBoundaryAsyncScheduler if is_async else _PromptBoundaryScheduler)(vllm_config, *args, **kwargs)
