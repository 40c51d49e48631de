"""What a planned model refuses at start: the combinations that would be served wrongly.

vLLM calls this for our architectures as soon as its configuration is complete, before any worker exists.
"""

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from model_executors.attention_plan import AttentionPlan
from model_executors.families import family_of

# Speculation that reads tokens only. The other methods read hidden states of every position, which the tail never sees.
TOKEN_SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")


class AttentionPlanConfig(VerifyAndUpdateConfig):
    """The checks of every `AttentionPlan...` architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the plan against the model and against how it is to be run.

        Raises:
            ValueError: with the name, the value and the fix.

        """
        model_config = vllm_config.model_config
        family_of(model_config.architecture)
        plan = AttentionPlan.from_hf_config(model_config.hf_config)
        offload = vllm_config.offload_config
        if plan.skipped and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
            raise ValueError(
                "weight offloading does not work with an attention plan; drop --cpu-offload-gb and the like"
            )
        _verify_pipeline(plan, vllm_config.parallel_config.pipeline_parallel_size)
        if not plan.has_tail:
            return
        tail = f"layers {plan.tail_start}-{len(plan.kinds) - 1} run on sampled positions only"
        if model_config.runner_type != "generate":
            raise ValueError(f"--runner {model_config.runner_type}: {tail}; pool with the stock model")
        if vllm_config.lora_config is not None:
            raise ValueError(f"--enable-lora: {tail} and would see other adapters' rows; merge the adapter or drop it")
        speculation = vllm_config.speculative_config
        if speculation is not None and speculation.method not in TOKEN_SPECULATION:
            raise ValueError(
                f"speculative method {speculation.method!r}: {tail}, and it reads hidden states of all of them; "
                f"use one of {', '.join(TOKEN_SPECULATION)}"
            )


def _verify_pipeline(plan: AttentionPlan, size: int) -> None:
    """vLLM cannot run a pipeline rank that has no KV cache at all."""
    for rank in range(size):
        start, end = get_pp_indices(len(plan.kinds), rank, size)
        if not any(start <= layer < end for layer in plan.attending):
            raise ValueError(
                f"--pipeline-parallel-size {size}: rank {rank} has layers {start}-{end - 1}, all of them skipped; "
                "use fewer ranks, or give it an attending layer with VLLM_PP_LAYER_PARTITION"
            )
