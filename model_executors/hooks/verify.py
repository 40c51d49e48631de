"""What a planned model needs set, and what it refuses at start: the combinations that would be served wrongly.

vLLM calls this for our architectures as soon as its configuration is complete, before any worker exists.
"""

from collections.abc import Iterator

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from model_executors import evidence, names
from model_executors.attention_plan import AttentionPlan
from model_executors.families import Family, family_of, own_window
from model_executors.heads.head_plan import HeadPlan

logger = init_logger(f"vllm.{__name__}")

# Speculation that reads tokens only. The other methods read hidden states of every position, which the layers above
# do not see.
TOKEN_SPECULATION = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")
MOST_AT_ONCE = 2048
"""Tokens of one request in a step, with windows: what is computed at once is held at once."""


class AttentionPlanConfig(VerifyAndUpdateConfig):
    """The checks of every `AttentionPlan...` architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the plan against the model and against how it is to be run.

        Raises:
            ValueError: with the name, the value and the fix.

        """
        family = family_of(vllm_config.model_config.architecture)
        plan = AttentionPlan.from_hf_config(vllm_config.model_config.hf_config)
        head = HeadPlan.from_hf_config(vllm_config.model_config.hf_config)
        for problem in (*_problems(plan, family, vllm_config), *_head_problems(head, vllm_config)):
            raise ValueError(problem)
        _check_evidence(plan, head, vllm_config)
        if plan.windowed:
            _prepare_windows(vllm_config)
        if plan.first_frozen < len(plan.layers):
            _prepare_frozen(vllm_config)
        if head.kind == "screened":
            _add_processor(vllm_config, names.FULL_VOCABULARY_ROWS)


def _check_evidence(plan: AttentionPlan, head: HeadPlan, vllm_config: VllmConfig) -> None:
    """Raise ValueError for what was never seen to answer right on this device, unless it was asked for."""
    device = "rocm" if current_platform.is_rocm() else vllm_config.device_config.device_type
    for line in evidence.unproved(plan, head, device):
        if not evidence.allowed():
            raise ValueError(line)
        logger.warning("%s is set: %s", evidence.UNPROVED, line)


def _problems(plan: AttentionPlan, family: Family, vllm_config: VllmConfig) -> Iterator[str]:
    """What would be served wrongly."""
    for layer, layer_plan in enumerate(plan.layers):
        if layer_plan.kind not in family.kinds:
            kinds = ", ".join(family.kinds)
            yield f"layer {layer} is {layer_plan.kind}, which {family.architecture} cannot be; use one of {kinds}"
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    if family.module == names.TRANSFORMERS_DECODER and not model_config.enforce_eager:
        yield (
            f"{family.architecture} runs on vLLM's Transformers backend, with which a planned model fails to compile; "
            "add --enforce-eager"
        )
    offload = vllm_config.offload_config
    if plan.skipped and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
        yield "weight offloading does not work with an attention plan; drop --cpu-offload-gb and the like"
    yield from _window_problems(plan, vllm_config)
    yield from _pipeline_problems(plan, parallel_config.pipeline_parallel_size)
    ranks = {layer_plan.rank for layer_plan in plan.layers if layer_plan.rank is not None}
    for rank in ranks:
        if rank % parallel_config.tensor_parallel_size:
            yield f"rank {rank} cannot be split over --tensor-parallel-size {parallel_config.tensor_parallel_size}"
    if plan.first_partial == len(plan.layers):
        return
    upper = f"layers {plan.first_partial}-{len(plan.layers) - 1} do not run for every position"
    if model_config.runner_type != "generate":
        yield f"--runner {model_config.runner_type}: {upper}; pool with the stock model"
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in TOKEN_SPECULATION:
        yield (
            f"speculative method {speculation.method!r}: {upper}, and it reads hidden states of all of them; "
            f"use one of {', '.join(TOKEN_SPECULATION)}"
        )
    if plan.first_frozen == len(plan.layers):
        return
    if parallel_config.enable_dbo:
        yield "--enable-dbo: a step with frozen layers cannot be split in two; drop it"
    if vllm_config.scheduler_config.scheduler_cls not in (None, names.SCHEDULER):
        yield (
            f"--scheduler-cls {vllm_config.scheduler_config.scheduler_cls}: frozen layers need a scheduler of their "
            "own; drop it"
        )


def _head_problems(head: HeadPlan, vllm_config: VllmConfig) -> Iterator[str]:
    """A head of ours makes whole rows of logits, and reads what the stock one does."""
    if head.kind == "stock":
        return
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        yield f"--enable-batch-sharded-sampling: a {head.kind} head makes whole rows of logits; drop it"
    if vllm_config.lora_config is not None:
        yield f"--enable-lora: a {head.kind} head was made for the model without adapters; take --head stock"
    if vllm_config.model_config.runner_type != "generate":
        yield f"--runner {vllm_config.model_config.runner_type}: a {head.kind} head makes logits only; use --head stock"
    if head.kind == "screened" and vllm_config.speculative_config is not None:
        yield "--head screened: with speculation vLLM does not say what each row's request needs; drop one of them"
    if head.kind == "screened" and vllm_config.device_config.device_type != "cpu":
        yield "--head screened: its packed kernel is torch's for CPUs; take --head stock on other devices"
    if head.kind == "screened" and vllm_config.use_v2_model_runner:
        yield "--head screened: its watch over the batch is for vLLM's Model Runner V1; set VLLM_USE_V2_MODEL_RUNNER=0"


def _window_problems(plan: AttentionPlan, vllm_config: VllmConfig) -> Iterator[str]:
    """A layer with a sliding window of its own never saw far; and what keeps the first and the last tokens needs vLLM's
    hybrid manager of the KV cache.
    """
    config = vllm_config.model_config.hf_config
    own = {layer: own_window(config, layer) for layer in plan.attending}
    for layer in plan.windowed:
        if own[layer] is not None:
            yield (
                f"window {plan.layers[layer].window} on layer {layer}: the model gives that layer a sliding window of "
                f"{own[layer]} already; leave it full"
            )
    if not plan.windowed:
        return
    reach = {plan.layers[layer].window or own[layer] for layer in plan.attending}
    if len(reach) == 1 and len(plan.windowed) < len(plan.attending):
        # vLLM takes layers of one window for layers of one kind.
        yield f"window {reach.pop()} is the model's own on the other layers: take another size, or leave a layer full"
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        yield (
            "--kv-transfer-config (or --kv-offloading-size): connectors do not know windows with a sink; drop it, or "
            "serve without windows"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager: without it windows save nothing; drop it, or serve without windows"
    if not current_platform.support_hybrid_kv_cache():
        yield "windows need vLLM's hybrid manager of the KV cache, which this platform lacks; serve without windows"
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            option = name.replace("_", "-")
            yield f"--{option} {getattr(parallel, name)}: vLLM splits no sliding window; drop it"


def _pipeline_problems(plan: AttentionPlan, size: int) -> Iterator[str]:
    """vLLM cannot run a rank that has no KV cache at all, and frozen layers need the same state on one rank."""
    for rank in range(size):
        start, end = get_pp_indices(len(plan.layers), rank, size)
        if not any(start <= layer < end for layer in plan.attending):
            yield (
                f"--pipeline-parallel-size {size}: rank {rank} has layers {start}-{end - 1}, all of them skipped; "
                "use fewer ranks, or give it an attending layer with VLLM_PP_LAYER_PARTITION"
            )
        if start <= plan.first_frozen < end and rank < size - 1:
            yield (
                f"--pipeline-parallel-size {size}: layers from {plan.first_frozen} on are frozen and begin on rank "
                f"{rank}; all of them must be on the last rank: use fewer ranks, or set VLLM_PP_LAYER_PARTITION"
            )


def _prepare_windows(vllm_config: VllmConfig) -> None:
    """Bound what is computed of a request in a step, and so held of it, where the user has not."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls not in (None, names.SCHEDULER) or not scheduler.enable_chunked_prefill:
        return
    scheduler.scheduler_cls = names.SCHEDULER
    if not scheduler.long_prefill_token_threshold:
        most = min(MOST_AT_ONCE, scheduler.max_num_batched_tokens, vllm_config.model_config.max_model_len)
        scheduler.long_prefill_token_threshold = most


def _prepare_frozen(vllm_config: VllmConfig) -> None:
    """Set what frozen layers need."""
    vllm_config.scheduler_config.scheduler_cls = names.SCHEDULER
    if vllm_config.speculative_config is None or vllm_config.use_v2_model_runner:
        _add_processor(vllm_config, names.FROZEN_PROMPTS)
    else:
        # V1 has no custom logits processors beside speculation, but this refuses prompt_logprobs by itself.
        vllm_config.cache_config.kv_sharing_fast_prefill = True


def _add_processor(vllm_config: VllmConfig, name: str) -> None:
    """One more of vLLM's logits processors."""
    processors = vllm_config.model_config.logits_processors or []
    if name not in processors:
        vllm_config.model_config.logits_processors = [*processors, name]
