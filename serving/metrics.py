"""Our rows on vLLM's `/metrics`: what the plan keeps and what it saves, beside stock.

vLLM finds the logger through its group `vllm.stat_logger_plugins` and makes one for each engine, in the process that
answers `/metrics`. A stock model of a known family gets the same rows, so that two dashboards can be laid side by side.
"""

import logging
from collections import Counter
from functools import cache
from typing import Any

import torch
from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.metrics.loggers import StatLoggerBase

from model_executors.attention_plan import CONFIG_KEY, KINDS, AttentionPlan
from model_executors.families import FAMILIES, family_of
from vllm_ext.footprint import count_parameters, kv_bytes

logger = logging.getLogger("vllm.vllm_ext")

LABELS = ("model_name", "engine")


@cache
def _gauge(name: str, documentation: str, *labels: str) -> Gauge:
    """The gauge of that name, made at its first use: one process may start several engines."""
    return Gauge(name, documentation, (*LABELS, *labels), multiprocess_mode="mostrecent")


def _dtype(name: str | torch.dtype) -> torch.dtype:
    return name if isinstance(name, torch.dtype) else STR_DTYPE_TO_TORCH_DTYPE[name]


class PlanStatLogger(StatLoggerBase):
    """Sets the gauges of one engine once; the plan does not change while it serves."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = vllm_config.model_config
        architecture = config.architecture
        if architecture in FAMILIES:
            plan = AttentionPlan.of(config.hf_config.num_hidden_layers)
        elif hasattr(config.hf_config, CONFIG_KEY):
            plan = AttentionPlan.from_hf_config(config.hf_config)
        else:
            return  # a model that no plan is for
        self.labels = {"model_name": config.served_model_name, "engine": str(engine_index)}
        self._set_layers(plan)
        self._set_kv(plan, vllm_config)
        if config.quantization is None:  # a quantized checkpoint's bytes do not follow from its shape
            self._set_weights(plan, vllm_config)

    def _set_layers(self, plan: AttentionPlan) -> None:
        gauge = _gauge("vllm_ext_layers", "Decoder layers by the kind of attention that the plan gives them.", "kind")
        counts = Counter(layer.kind for layer in plan.layers)
        for kind in KINDS:
            gauge.labels(**self.labels, kind=kind).set(counts[kind])

    def _set_kv(self, plan: AttentionPlan, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        cache_dtype = vllm_config.cache_config.cache_dtype
        dtype = _dtype(config.dtype if cache_dtype == "auto" else cache_dtype)
        shape = (config.get_total_num_kv_heads(), config.get_head_size(), dtype.itemsize)
        held, stock = kv_bytes(plan, *shape), kv_bytes(AttentionPlan.of(len(plan.layers)), *shape)
        for name, documentation, value in (
            (
                "vllm_ext_kv_cache_token_bytes",
                "KV-cache bytes that one token takes, over all ranks and the layers that hold every token.",
                held.token,
            ),
            (
                "vllm_ext_kv_cache_window_bytes",
                "KV-cache bytes that one long request takes, over all ranks and the layers that hold a window.",
                held.window,
            ),
            (
                "vllm_ext_stock_kv_cache_token_bytes",
                "What one token would take with full attention in every layer.",
                stock.token,
            ),
        ):
            _gauge(name, documentation).labels(**self.labels).set(value)

    def _set_weights(self, plan: AttentionPlan, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        try:
            parameters = count_parameters(config.hf_config, family_of(config.architecture), plan)
        except Exception as error:  # a custom configuration, say: a metric must not keep a server from starting
            logger.warning("No vllm_ext_weight_bytes on /metrics: %s", error)
            return
        element_bytes = _dtype(config.dtype).itemsize
        _gauge("vllm_ext_weight_bytes", "Bytes of the checkpoint's weights that are held, over all ranks.").labels(
            **self.labels
        ).set(parameters.held * element_bytes)
        _gauge("vllm_ext_weight_fitted_bytes", "Bytes of the weights that the plan adds, over all ranks.").labels(
            **self.labels
        ).set(parameters.fitted * element_bytes)
        _gauge(
            "vllm_ext_weight_dropped_bytes", "Bytes of the weights that the plan leaves out, over all ranks."
        ).labels(**self.labels).set(parameters.dropped * element_bytes)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing changes from step to step."""

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own line."""
