"""A server's `/metrics` throughout a test: scraped here, or asked of a Prometheus that scrapes it already."""

import contextlib
import math
import threading
from types import TracebackType

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.answer import now

ROWS = {
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:prefix_cache_queries_total": "prefix_queries",
}
MEANS = {"kv_cache_usage"}
"""Taken as the mean over a server's engines; the others are summed."""
INTERVAL = 1.0
Sample = dict[str, float]


def scrape(url: str) -> Sample:
    """The rows that a report shows, and how many tokens the KV cache holds where vLLM says so.

    Raises:
        httpx.HTTPError: where there is no `/metrics`.
        ValueError: where it is none of Prometheus's.

    """
    text = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).raise_for_status().text
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ROWS:
                found.setdefault(ROWS[sample.name], []).append(sample.value)
            elif sample.name == "vllm:cache_config_info":
                tokens = sample.labels.get("kv_cache_size_tokens", "")
                found.setdefault("kv_capacity_tokens", []).append(float(tokens) if tokens.isdecimal() else 0.0)
    return {name: sum(values) / (len(values) if name in MEANS else 1) for name, values in found.items()}


def capacity_of(url: str) -> float:
    """Tokens that the KV cache holds, as `/v1/plan` says, or else vLLM's `/metrics`; NaN where neither does."""
    with contextlib.suppress(httpx.HTTPError, KeyError, ValueError, TypeError):
        return float(httpx.get(f"{url}/v1/plan", timeout=10, trust_env=False).json()["kv_cache"]["capacity_tokens"])
    with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
        return scrape(url)["kv_capacity_tokens"]
    return math.nan


def prefix_cache(url: str) -> tuple[float, float]:
    """Tokens found in the prefix cache so far, and looked up; NaN where the server does not say."""
    with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
        found = scrape(url)
        return found["prefix_hits"], found["prefix_queries"]
    return math.nan, math.nan


class Scraper:
    """Scrapes a server once a second, in a thread, for as long as the block."""

    def __init__(self, url: str) -> None:
        self.url, self.samples = url, list[Sample]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            # There are servers without /metrics, and such as are too busy for a second.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                self.samples.append({"time": now()} | scrape(self.url))
            if self._done.wait(INTERVAL):
                return


def from_prometheus(prometheus: str, instance: str, start: float, end: float) -> list[Sample]:
    """What a Prometheus at that URL has scraped of `instance` (HOST:PORT) between two Unix times.

    Raises:
        ValueError: where it cannot be asked, or knows nothing of that instance.

    """
    samples: dict[float, Sample] = {}
    step = max(INTERVAL, (end - start) / 10_000)  # Prometheus gives at most 11,000 points
    for row, name in ROWS.items():
        how = "avg" if name in MEANS else "sum"
        asked: dict[str, str | float] = {
            "query": f'{how}({{__name__="{row}",instance="{instance}"}})',
            "start": start,
            "end": end,
            "step": step,
        }
        try:
            answer = httpx.get(
                f"{prometheus.rstrip('/')}/api/v1/query_range", params=asked, timeout=30, trust_env=False
            )
            results = answer.raise_for_status().json()["data"]["result"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise ValueError(f"prometheus {prometheus}: {error}") from error
        for series in results:
            for time, value in series["values"]:
                samples.setdefault(time, {"time": time})[name] = float(value)
    if not samples:
        raise ValueError(f"prometheus {prometheus}: it has nothing of instance {instance}; name one that it scrapes")
    return [samples[time] for time in sorted(samples)]
