"""Our rows on vLLM's `/metrics`: what the plan keeps and saves beside stock, and what the endpoint refuses.

vLLM finds the logger through its group `vllm.stat_logger_plugins` and makes one for each engine, in every API server
process. A stock model of a known family gets the same rows, so that two dashboards can be laid side by side. With
several processes prometheus-client adds up their files: counters are sums, and of gauges the latest value counts, since
vLLM sends an engine's state to one of them only.
"""

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from model_executors.attention_plan import KINDS
from serving.errors import REASONS, Reason
from serving.plan import PlanReport, plan_of

LABELS = ("model_name", "engine")

GAUGES = {
    "vllm_ext_kv_cache_token_bytes": (
        "KV-cache bytes that one token takes, over all ranks and the layers that hold every token."
    ),
    "vllm_ext_kv_cache_window_bytes": (
        "KV-cache bytes that one long request takes, over all ranks and the layers that hold a window."
    ),
    "vllm_ext_stock_kv_cache_token_bytes": "What one token would take with full attention in every layer.",
    "vllm_ext_kv_cache_capacity_tokens": (
        "Tokens that the KV cache holds, in requests of the model's greatest length, as vLLM counts them."
    ),
    "vllm_ext_kv_cache_capacity_bytes": "Bytes of the KV cache, over all ranks.",
    "vllm_ext_kv_cache_used_tokens": "Of the capacity in tokens, the part whose blocks are in use.",
    "vllm_ext_kv_cache_used_bytes": "Of the capacity in bytes, the part whose blocks are in use.",
    "vllm_ext_stock_kv_cache_capacity_tokens": "Tokens that full attention in every layer would hold in these bytes.",
    "vllm_ext_weight_bytes": "Bytes of the checkpoint's weights that are held, over all ranks.",
    "vllm_ext_weight_fitted_bytes": "Bytes of the weights that the plan adds, over all ranks.",
    "vllm_ext_weight_dropped_bytes": "Bytes of the weights that the plan leaves out, over all ranks.",
}
COUNTERS = {
    "vllm_ext_prompt_tokens_total": "Prompt tokens that were computed, those found in the prefix cache not among them.",
    "vllm_ext_tail_skipped_prompt_tokens_total": (
        "Computed prompt tokens that never entered the tail or the frozen layers: all but the last of each prompt."
    ),
}


@cache
def _gauge(name: str, documentation: str, *labels: str, mode: str = "mostrecent") -> Gauge:
    """The gauge of that name, made at its first use: one process may start several engines."""
    return Gauge(name, documentation, labels, multiprocess_mode=mode)  # type: ignore[arg-type]


@cache
def _counter(name: str, documentation: str, *labels: str) -> Counter:
    return Counter(name, documentation, labels)


class PlanStatLogger(StatLoggerBase):
    """The rows of one engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.labels = (vllm_config.model_config.served_model_name, str(engine_index))
        self.report = PlanReport.of(vllm_config)
        if self.report is None:
            return  # a model that no plan is for
        plan = plan_of(vllm_config)
        assert plan is not None
        self.partial = plan.first_partial < len(plan.layers)
        self._set_plan(self.report)
        self.used = [self._of_engine(f"vllm_ext_kv_cache_used_{unit}") for unit in ("tokens", "bytes")]
        for gauge in self.used:
            gauge.set(0)  # or, with several processes, it has no row before the first step
        self.prompt_tokens, self.skipped = (
            _counter(name, documentation, *LABELS).labels(*self.labels) for name, documentation in COUNTERS.items()
        )

    def _of_engine(self, name: str) -> Gauge:
        return _gauge(name, GAUGES[name], *LABELS).labels(*self.labels)

    def _set_plan(self, report: PlanReport) -> None:
        """What does not change while it serves."""
        documentation = "Decoder layers by the kind of attention that the plan gives them."
        layers = _gauge("vllm_ext_layers", documentation, *LABELS, "kind")
        for kind in KINDS:
            layers.labels(*self.labels, kind).set(report.kinds[kind])
        values = {
            "vllm_ext_kv_cache_token_bytes": report.kv_cache.token_bytes,
            "vllm_ext_kv_cache_window_bytes": report.kv_cache.window_bytes,
            "vllm_ext_stock_kv_cache_token_bytes": report.kv_cache.stock_token_bytes,
            "vllm_ext_kv_cache_capacity_tokens": report.kv_cache.capacity_tokens,
            "vllm_ext_kv_cache_capacity_bytes": report.kv_cache.capacity_bytes,
            "vllm_ext_stock_kv_cache_capacity_tokens": report.kv_cache.stock_capacity_tokens,
        }
        if report.weights is not None:
            values |= {
                "vllm_ext_weight_bytes": report.weights.held_bytes,
                "vllm_ext_weight_fitted_bytes": report.weights.fitted_bytes,
                "vllm_ext_weight_dropped_bytes": report.weights.dropped_bytes,
            }
        for name, value in values.items():
            if value is not None:
                self._of_engine(name).set(value)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """After each step: how full the KV cache is, and which prompt tokens were computed."""
        if self.report is None:
            return
        if scheduler_stats is not None:
            cache = self.report.kv_cache
            for gauge, size in zip(self.used, (cache.capacity_tokens, cache.capacity_bytes), strict=True):
                gauge.set(scheduler_stats.kv_cache_usage * (size or 0))
        if iteration_stats is not None and (computed := iteration_stats.prompt_token_stats.computed):
            self.prompt_tokens.inc(computed)
            if self.partial:
                # A first token is timed for each prompt whose last token was computed.
                self.skipped.inc(max(0, computed - len(iteration_stats.time_to_first_tokens_iter)))

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own line."""


class HttpMetrics:
    """What the middleware counts, in each API server process."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        documentation = "HTTP requests that were accepted and not answered in full yet, the queued ones among them."
        self._in_flight = self._live("vllm_ext_http_requests_in_flight", documentation)
        self._queued = self._live(
            "vllm_ext_http_requests_queued",
            "HTTP requests that wait for a place among --max-concurrent-requests; vllm:num_requests_waiting has none "
            "of them, since the engine does not know them yet.",
        )
        self._rejected = _counter(
            "vllm_ext_rejected_requests_total",
            "HTTP requests that were refused before vLLM saw them, by the limit that refused them.",
            "model_name",
            "reason",
        )
        for reason in REASONS:
            self._rejected.labels(model_name, reason)  # so that each has its row before the first

    def _live(self, name: str, documentation: str) -> Gauge:
        """Over the processes that live."""
        return _gauge(name, documentation, "model_name", mode="livesum").labels(self.model_name)

    def may_queue(self, requests: int) -> None:
        """Say how many may wait at most."""
        self._live("vllm_ext_max_queued_requests", "HTTP requests that --max-queued-requests lets wait.").set(requests)

    def queued(self, change: int) -> None:
        """One more waits, or one less."""
        self._queued.inc(change)

    def in_flight(self, change: int) -> None:
        """One more, or one less."""
        self._in_flight.inc(change)

    def rejected(self, reason: Reason) -> None:
        """Count one."""
        self._rejected.labels(self.model_name, reason).inc()
