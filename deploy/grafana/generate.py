"""Grafana dashboards as code: of one endpoint, and of a variant beside its baseline.

    python deploy/grafana/generate.py [FOLDER]      # writes deploy/grafana/dashboards/*.json anew

The JSON is kept in the repository, so that Grafana, compose and the chart need nothing of this; a test sees to it that
both agree, and runs every expression against a Prometheus that scraped real servers. `$job` and `$instance` are
Prometheus' own labels: a deployment is one job, and a replica one instance.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, VariableOption, VariableRefresh, VariableSort
from panels import SOURCE, Panel, built, latency, mean, or_zero, quantile, rate, share, total

DASHBOARDS = Path(__file__).parent / "dashboards"
BASELINE, VARIANT = 'job="$baseline"', 'job="$variant"'


def endpoint_rows() -> dict[str, list[Panel]]:
    """One deployment: vLLM's usual panels, and what the plan and the head do."""
    where = 'job=~"$job", instance=~"$instance"'
    # Where heads are served, vLLM's gauges have no rows before the engine's first step.
    running = or_zero(total("vllm:num_requests_running", where))
    waiting = or_zero(f'sum({{__name__=~"vllm:num_requests_waiting|vllm_ext_http_requests_queued", {where}}})')
    usage = f"vllm:kv_cache_usage_perc{{{where}}}"
    rejected = or_zero(rate("vllm_ext_rejected_requests_total", where, "reason"), "reason", "any")
    bad = rate("http_requests_total", f'{where}, handler=~"/v1/.*", status!="2xx"', "status")
    saved = (
        f"1 - {total('vllm_ext_kv_cache_token_bytes', where)} / {total('vllm_ext_stock_kv_cache_token_bytes', where)}"
    )
    stock_rows = f'{where}, head="stock"'
    fallback = share(rate("vllm_ext_head_rows_total", stock_rows), rate("vllm_ext_head_rows_total", where))
    hits = share(rate("vllm:prefix_cache_hits_total", where), rate("vllm:prefix_cache_queries_total", where))
    return {
        "Now": [
            Panel("Replicas up", {"up": total("up", where)}, "short", "Servers whose metrics answer.", True),
            Panel("Running", {"": running}, "short", "Requests in batches.", True),
            Panel("Waiting", {"": waiting}, "short", "In the engines' queues and before them.", True),
            Panel("Output", {"": rate("vllm:generation_tokens_total", where)}, "tps", "Tokens a second.", True),
            Panel(
                "KV cache in use",
                {"": or_zero(f"max({usage})")},
                "percentunit",
                "The fullest replica. Near 100%, requests wait or are preempted.",
                True,
            ),
            Panel("KV bytes a token saved", {"": saved}, "percentunit", "Beside attention in every layer.", True),
        ],
        "Latency": [
            latency("Time to first token", "vllm:time_to_first_token_seconds", where, "Queue and prefill."),
            latency("Inter-token latency", "vllm:inter_token_latency_seconds", where, "Between two streamed tokens."),
            latency("End to end", "vllm:e2e_request_latency_seconds", where, "The whole request."),
            latency("Queue", "vllm:request_queue_time_seconds", where, "Waiting before prefill: add replicas."),
        ],
        "Throughput": [
            Panel(
                "Tokens",
                {
                    "prompt": rate("vllm:prompt_tokens_total", where),
                    "generated": rate("vllm:generation_tokens_total", where),
                    "prompt, not in the tail": rate("vllm_ext_tail_skipped_prompt_tokens_total", where),
                },
                "tps",
                "Prompt tokens that never enter a plan's tail are work saved.",
            ),
            Panel(
                "Requests finished",
                {"{{finished_reason}}": rate("vllm:request_success_total", where, "finished_reason")},
                "reqps",
                "By why they ended: length and stop are answers; abort is a client that went away; error is ours.",
            ),
            Panel(
                "Requests in engines",
                {
                    "running": running,
                    "waiting": or_zero(total("vllm:num_requests_waiting", where)),
                    "waiting before the engine": or_zero(total("vllm_ext_http_requests_queued", where)),
                    "in HTTP": or_zero(total("vllm_ext_http_requests_in_flight", where)),
                },
                "short",
                "Waiting for minutes means too few replicas, or a KV cache too small.",
            ),
            Panel(
                "Refused and failed",
                {"rejected: {{reason}}": rejected, "HTTP {{status}}": or_zero(bad, "status", "4xx")},
                "reqps",
                "Rejections by limit, and answers to /v1 that are not 2xx.",
            ),
        ],
        "KV cache": [
            Panel(
                "Use by replica",
                {"{{instance}}": or_zero(f"max by (instance) ({usage})", "instance", "each")},
                "percentunit",
                "Part of the blocks in use.",
            ),
            Panel(
                "Tokens",
                {
                    "in use": total("vllm_ext_kv_cache_used_tokens", where),
                    "capacity": total("vllm_ext_kv_cache_capacity_tokens", where),
                    "stock would hold": total("vllm_ext_stock_kv_cache_capacity_tokens", where),
                },
                "short",
                "Capacity beside what attention in every layer would hold in the same memory.",
            ),
            Panel(
                "Bytes",
                {
                    "in use": total("vllm_ext_kv_cache_used_bytes", where),
                    "capacity": total("vllm_ext_kv_cache_capacity_bytes", where),
                },
                "bytes",
                "Of all replicas.",
            ),
            Panel("Prefix-cache hits", {"hits": hits}, "percentunit", "Part of the prompt tokens looked up."),
            Panel(
                "Preemptions",
                {"{{instance}}": rate("vllm:num_preemptions_total", where, "instance")},
                "short",
                "A second. Each computes a request anew: a KV cache too small for the load.",
            ),
            Panel(
                "Bytes of one token",
                {
                    "held": f"max by (job) (vllm_ext_kv_cache_token_bytes{{{where}}})",
                    "stock": f"max by (job) (vllm_ext_stock_kv_cache_token_bytes{{{where}}})",
                },
                "bytes",
                "In the layers that hold every token, over all ranks.",
            ),
        ],
        "Plan and head": [
            Panel(
                "Layers by kind of attention",
                {"{{job}} {{kind}}": f"max by (job, kind) (vllm_ext_layers{{{where}}})"},
                "short",
                "full, window, freeze, skip.",
            ),
            Panel(
                "Weight bytes",
                {
                    "held": total("vllm_ext_weight_bytes", where),
                    "left out": total("vllm_ext_weight_dropped_bytes", where),
                    "fitted": total("vllm_ext_weight_fitted_bytes", where),
                },
                "bytes",
                "Of all replicas; not for quantized checkpoints.",
            ),
            Panel(
                "Rows of logits by head",
                {"{{head}}": or_zero(rate("vllm_ext_head_rows_total", where, "head"), "head", "own")},
                "short",
                "A second: made by the head itself (own), or by the stock head; 0 where there is no other head.",
            ),
            Panel(
                "Rows that fell back to the stock head",
                {"part": fallback},
                "percentunit",
                "Far from what the checkpoint was calibrated for, traffic is unlike the text of the calibration.",
            ),
        ],
    }


def beside(title: str, expression: str, unit: str, description: str) -> list[Panel]:
    """`expression`, with WHERE in it, of both jobs; and the variant's over the baseline's."""
    baseline, variant = expression.replace("WHERE", BASELINE), expression.replace("WHERE", VARIANT)
    return [
        Panel(title, {"baseline": baseline, "variant": variant}, unit, description),
        Panel(f"{title}: ratio", {"variant / baseline": f"({variant}) / ({baseline})"}, "percentunit", description),
    ]


def variant_rows() -> dict[str, list[Panel]]:
    """Two deployments under the same load."""
    less, more = "Lower is better.", "Higher is better."
    saved = (
        f"1 - {total('vllm_ext_kv_cache_token_bytes', VARIANT)} / {total('vllm_ext_kv_cache_token_bytes', BASELINE)}"
    )
    weights = f"1 - {total('vllm_ext_weight_bytes', VARIANT)} / {total('vllm_ext_weight_bytes', BASELINE)}"
    per_replica = "avg({}{{WHERE}})"
    return {
        "What the variant saves": [
            Panel("KV bytes a token saved", {"": saved}, "percentunit", "In layers that hold every token.", True),
            Panel("Weight bytes saved", {"": weights}, "percentunit", "Beside the baseline's.", True),
            Panel(
                "KV capacity",
                {
                    "": f"avg(vllm_ext_kv_cache_capacity_tokens{{{VARIANT}}})"
                    f" / avg(vllm_ext_kv_cache_capacity_tokens{{{BASELINE}}})"
                },
                "percentunit",
                "Tokens a replica, variant over baseline; with the same memory for both.",
                True,
            ),
            Panel(
                "Prompt tokens not in the tail",
                {
                    "": share(
                        rate("vllm_ext_tail_skipped_prompt_tokens_total", VARIANT),
                        rate("vllm_ext_prompt_tokens_total", VARIANT),
                    )
                },
                "percentunit",
                "Of the variant's prompt tokens.",
                True,
            ),
        ],
        "Throughput": [
            *beside("Output", rate("vllm:generation_tokens_total", "WHERE"), "tps", more),
            *beside("Prompts", rate("vllm:prompt_tokens_total", "WHERE"), "tps", more),
            *beside("Requests", rate("vllm:request_success_total", "WHERE"), "reqps", "The same load gives the same."),
        ],
        "Latency": [
            *beside("TTFT, p50", quantile(0.5, "vllm:time_to_first_token_seconds", "WHERE"), "s", less),
            *beside("TTFT, p99", quantile(0.99, "vllm:time_to_first_token_seconds", "WHERE"), "s", less),
            *beside("ITL, mean", mean("vllm:inter_token_latency_seconds", "WHERE"), "s", less),
            *beside("ITL, p99", quantile(0.99, "vllm:inter_token_latency_seconds", "WHERE"), "s", less),
            *beside("End to end, p50", quantile(0.5, "vllm:e2e_request_latency_seconds", "WHERE"), "s", less),
        ],
        "KV cache": [
            *beside("Capacity", per_replica.format("vllm_ext_kv_cache_capacity_tokens"), "short", "Tokens a replica."),
            Panel(
                "Use",
                {
                    name: or_zero(f"max(vllm:kv_cache_usage_perc{{{where}}})")
                    for name, where in (("baseline", BASELINE), ("variant", VARIANT))
                },
                "percentunit",
                "The fullest replica. " + less,
            ),
            Panel(
                "Preemptions",
                {
                    name: rate("vllm:num_preemptions_total", where)
                    for name, where in (("baseline", BASELINE), ("variant", VARIANT))
                },
                "short",
                "A second. " + less,
            ),
            *beside("Bytes of one token", per_replica.format("vllm_ext_kv_cache_token_bytes"), "bytes", less),
        ],
    }


def job_variable(name: str, label: str, default: str, several: bool) -> dashboard.QueryVariable:
    """A choice among the jobs that are vLLM's."""
    variable = dashboard.QueryVariable(name).label(label).datasource(SOURCE).query("label_values(vllm_ext_layers, job)")
    variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    if several:
        return variable.multi(True).include_all(True).current(VariableOption(text="All", value="$__all"))
    return variable.current(VariableOption(text=default, value=default))


def board(title: str, uid: str, rows: Mapping[str, list[Panel]], *variables: dashboard.QueryVariable) -> str:
    """The dashboard's JSON."""
    whole = dashboard.Dashboard(title).uid(uid).tags(["vllm", "vllm-ext"]).refresh("10s").time("now-30m", "now")
    whole.readonly().tooltip(DashboardCursorSync.CROSSHAIR)
    whole.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for variable in variables:
        whole.with_variable(variable)
    for row, panels in rows.items():
        whole.with_row(dashboard.Row(row))
        for panel in panels:
            whole.with_panel(built(panel))
    return json.dumps(whole.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def generate() -> dict[str, str]:
    """Each dashboard's file name and JSON."""
    instance = dashboard.QueryVariable("instance").label("Replica").datasource(SOURCE)
    instance.query('label_values(vllm_ext_layers{job=~"$job"}, instance)').refresh(
        VariableRefresh.ON_TIME_RANGE_CHANGED
    )
    instance.multi(True).include_all(True).current(VariableOption(text="All", value="$__all"))
    return {
        "endpoint.json": board(
            "vLLM endpoint", "vllm-ext-endpoint", endpoint_rows(), job_variable("job", "Job", "", True), instance
        ),
        "variant.json": board(
            "Variant against baseline",
            "vllm-ext-variant",
            variant_rows(),
            job_variable("baseline", "Baseline", "baseline", False),
            job_variable("variant", "Variant", "variant", False),
        ),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else DASHBOARDS
    for name, text in generate().items():
        (folder / name).write_text(text)
