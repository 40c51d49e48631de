"""vLLM's scheduler with what an attention plan needs of it.

With frozen layers a step never takes both the end of a request's prompt and tokens that were generated after it. They
come together only when a preempted request is computed anew; then the prompt's tokens are frozen again, and the
generated ones flow through all layers again, so that preemption does not change the answer.

With windows a step never takes more of one request than `long_prefill_token_threshold`, which vLLM itself lets go of
where a request is alone. What a request holds of the KV cache follows from it: see `hooks/kv_cache.py`.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from model_executors.attention_plan import AttentionPlan


class _Planned:
    """Mixin before a scheduler class."""

    vllm_config: VllmConfig

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        plan = AttentionPlan.from_hf_config(vllm_config.model_config.hf_config)
        self.freezes = plan.first_frozen < len(plan.layers)
        bound = vllm_config.scheduler_config.long_prefill_token_threshold
        self.most = bound if plan.windowed and bound else vllm_config.scheduler_config.max_num_batched_tokens

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM's last word on how many tokens a request gets in a step."""
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, min(num_new_tokens, self.most)
        )
        prompt_left = request.num_prompt_tokens - num_computed_tokens
        return min(num_new_tokens, prompt_left) if self.freezes and prompt_left > 0 else num_new_tokens


class _PlannedScheduler(_Planned, Scheduler):
    """For synchronous scheduling."""


class _PlannedAsyncScheduler(_Planned, AsyncScheduler):
    """For asynchronous scheduling."""


def planned_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Scheduler:
    """Make the one that the configuration asks for: whether it schedules asynchronously is settled late."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (_PlannedAsyncScheduler if is_async else _PlannedScheduler)(vllm_config, *args, **kwargs)
