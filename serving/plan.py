"""What a served model's plan is and saves, worked out from vLLM's configuration: for `/v1/plan` and `/metrics`."""

import logging
from collections import Counter
from typing import Any, Self

from pydantic import BaseModel, Field
from vllm.config import VllmConfig

from model_executors.attention_plan import CONFIG_KEY, KINDS, AttentionPlan, Consolidation, Kind, LayerPlan
from model_executors.families import FAMILIES, family_of, own_window
from model_executors.heads.head_plan import HeadKind, HeadPlan
from serving.capacity import cache_dtype, capacities, torch_dtype
from vllm_ext.costs import KvBytes, Reach, count_parameters, reaches
from vllm_ext.layers import changes_of, format_plan
from vllm_ext.tasks.items import asked_in

logger = logging.getLogger("vllm.vllm_ext")


class LayerReport(BaseModel):
    """What one layer's attention is."""

    layer: int
    kind: Kind
    window: int | None = Field(description="Tokens that it sees beside its sink, its own included.")
    consolidation: Consolidation = Field(description="What a skipped layer adds in place of its attention.")
    rank: int | None = Field(description="Of a linear map; null is a full matrix.")
    kv_cache_token_bytes: int = Field(description="KV-cache bytes that each token of the context takes, all ranks.")
    kv_cache_window_bytes: int = Field(description="KV-cache bytes that a long request takes at most, all ranks.")


class KvCacheReport(BaseModel):
    """The KV cache beside a stock model's, over all ranks of one engine."""

    token_bytes: int = Field(description="Bytes a token, in the layers that hold every token.")
    window_bytes: int = Field(description="Bytes a long request, in the layers that hold a window.")
    stock_token_bytes: int = Field(description="Bytes a token with attention in every layer.")
    capacity_tokens: int | None = Field(description="Tokens that it holds, as vLLM counts them.")
    capacity_bytes: int | None
    stock_capacity_tokens: int | None = Field(description="Tokens that the stock model would hold in these bytes.")


class WeightsReport(BaseModel):
    """Bytes of the weights, over all ranks."""

    held_bytes: int
    dropped_bytes: int = Field(description="Left out, since the plan has no use for them.")
    fitted_bytes: int = Field(description="Added by the plan.")


class HeadReport(BaseModel):
    """What makes logits."""

    kind: HeadKind
    bytes: int = Field(description="Held beside the stock head.")
    threshold: float = Field(description="Of character heads: rows surer than this are not given to the stock head.")


class PlanReport(BaseModel):
    """The attention plan that is served, and what it saves beside the stock model."""

    model: str
    architecture: str
    name: str = Field(description="The plan in a few words: 'stock', or 'skip 27-29'.")
    kinds: dict[str, int] = Field(description="How many layers are of each kind.")
    layers: list[LayerReport]
    kv_cache: KvCacheReport
    weights: WeightsReport | None = Field(description="Null for quantized checkpoints.")
    head: HeadReport
    judged: dict[str, Any] | None = Field(
        description="What a search saw the plan keep of stock's scores, by task, in texts of which `lengths`; "
        "null where none judged it."
    )
    provenance: dict[str, Any] = Field(description="What the fitted and trained tensors were made from, and by what.")

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Self | None:
        """Report on the model that is served; None where it is of a family that no plan is for."""
        plan = plan_of(vllm_config)
        if plan is None:
            return None
        config = vllm_config.model_config
        section = getattr(config.hf_config, CONFIG_KEY, None) or {}
        counts = Counter(layer.kind for layer in plan.layers)
        return cls(
            model=str(config.served_model_name),
            architecture=config.architecture,
            name=format_plan(changes_of(plan)),
            kinds={kind: counts[kind] for kind in KINDS},
            layers=[_layer(vllm_config, number, layer) for number, layer in enumerate(plan.layers)],
            kv_cache=_kv_cache(vllm_config, plan),
            weights=_weights(vllm_config, plan),
            head=_head(vllm_config),
            judged=section.get("judged"),
            provenance={name: section[name] for name in ("made_by", "fit", "training") if name in section},
        )

    @property
    def judged_line(self) -> str:
        """What an operator should know: up to which length the plan was judged, and what was asked in shorter ones."""
        judged = self.judged or {}
        longest = max(judged.get("lengths", []), default=0)
        if not longest:
            return f"Plan {self.name}: it was not judged on tasks that retrieve; vllm-ext search does"
        asked: dict[str, int] = {}
        for what, length in map(asked_in, judged.get("tasks", {})):
            asked[what] = max(asked.get(what, 0), length)
        less = [f"{what} of up to {length:,}" for what, length in sorted(asked.items()) if 0 < length < longest]
        but = f" ({', '.join(less)})" if less else ""
        return f"Plan {self.name}: it was judged on texts of up to {longest:,} tokens{but}; beyond, nobody looked"


def plan_of(vllm_config: VllmConfig) -> AttentionPlan | None:
    """The model's plan; of a stock model of a known family, all of it in full."""
    config = vllm_config.model_config
    if config.architecture in FAMILIES:
        return AttentionPlan.of(config.hf_config.num_hidden_layers)
    return AttentionPlan.from_hf_config(config.hf_config) if hasattr(config.hf_config, CONFIG_KEY) else None


def _layer(vllm_config: VllmConfig, number: int, layer: LayerPlan) -> LayerReport:
    reach = Reach.of(layer, own_window(vllm_config.model_config.hf_config, number))
    held = KvBytes.of([] if layer.kind == "skip" else [reach], _token_bytes(vllm_config))
    return LayerReport(
        layer=number,
        kind=layer.kind,
        window=layer.window,
        consolidation=layer.consolidation,
        rank=layer.rank,
        kv_cache_token_bytes=held.token,
        kv_cache_window_bytes=held.window,
    )


def _kv_cache(vllm_config: VllmConfig, plan: AttentionPlan) -> KvCacheReport:
    config, one = vllm_config.model_config.hf_config, _token_bytes(vllm_config)
    held, stock = (
        KvBytes.of(reaches(config, each).values(), one) for each in (plan, AttentionPlan.of(len(plan.layers)))
    )
    found = capacities(vllm_config, plan)
    return KvCacheReport(
        token_bytes=held.token,
        window_bytes=held.window,
        stock_token_bytes=stock.token,
        capacity_tokens=found and found[0].tokens,
        capacity_bytes=found and found[0].bytes,
        stock_capacity_tokens=found and found[1].tokens,
    )


def _token_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of K and V of a token in a layer, over all ranks."""
    config = vllm_config.model_config
    return 2 * config.get_total_num_kv_heads() * config.get_head_size() * cache_dtype(vllm_config).itemsize


def _weights(vllm_config: VllmConfig, plan: AttentionPlan) -> WeightsReport | None:
    config = vllm_config.model_config
    if config.quantization is not None:  # a quantized checkpoint's bytes do not follow from its shape
        return None
    try:
        parameters = count_parameters(config.hf_config, family_of(config.architecture), plan)
    except Exception as error:  # a custom configuration, say: a report must not keep a server from starting
        logger.warning("No vllm_ext_weight_bytes on /metrics: %s", error)
        return None
    size = torch_dtype(config.dtype).itemsize
    return WeightsReport(
        held_bytes=parameters.held * size,
        dropped_bytes=parameters.dropped * size,
        fitted_bytes=parameters.fitted * size,
    )


def _head(vllm_config: VllmConfig) -> HeadReport:
    config = vllm_config.model_config
    head = HeadPlan.from_hf_config(config.hf_config)
    size = head.bytes(config.get_hidden_size(), config.get_vocab_size(), torch_dtype(config.dtype).itemsize)
    return HeadReport(kind=head.kind, bytes=size, threshold=head.threshold)
