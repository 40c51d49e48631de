"""Servers as processes of their own, with their logs and process ids at hand: for what happens when they are hurt."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from vllm_ext.process import free_port

COMMAND = [sys.executable, "-m", "vllm_ext.cli.main", "serve"]


@dataclass
class Server:
    """One that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    headers: dict[str, str]
    metrics_url: str = ""
    """Where its metrics are, if not among its other routes."""

    def get(self, path: str, **settings) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, headers=self.headers, **settings)

    def post(self, path: str, body, **settings) -> httpx.Response:
        headers = self.headers | settings.pop("headers", {})
        return httpx.post(self.url + path, json=body, timeout=settings.pop("timeout", 120), headers=headers, **settings)

    def metrics(self) -> dict[str, float]:
        """The rows, by name and labels as they are printed."""
        return rows(self.metrics_text())

    def metrics_text(self) -> str:
        return httpx.get(self.metrics_url or f"{self.url}/metrics", timeout=30).text

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the rows of that name with those labels."""
        found = [
            value
            for row, value in self.metrics().items()
            if row.partition("{")[0] == name and all(f'{label}="{text}"' in row for label, text in labels.items())
        ]
        assert found, f"no {name} with {labels}"
        return sum(found)

    def engines(self) -> list[psutil.Process]:
        """The engines' processes, by the name that vLLM gives them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "EngineCore" in child.cmdline()[0]]

    def idle(self, seconds: float = 30) -> bool:
        """Whether within that time nothing runs, waits or holds blocks any more."""
        return eventually(
            lambda: (
                self.metric("vllm:num_requests_running") == 0
                and self.metric("vllm:num_requests_waiting") == 0
                and self.metric("vllm:kv_cache_usage_perc") == 0
                and self.metric("vllm_ext_http_requests_in_flight") == 0
            ),
            seconds,
        )


def rows(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def eventually(holds, seconds: float = 30) -> bool:
    """Whether it holds within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if holds():
                return True
        time.sleep(0.1)
    return False


@contextmanager
def served(
    model: Path, *options: str | int, log: Path, key: str | None = None, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Serve `model` with `vllm-ext serve` for as long as the block."""
    port = free_port()
    command = [*COMMAND, str(model), "--port", str(port), "--enforce-eager", *map(str, options)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=os.environ | (env or {})
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    running = Server(f"http://127.0.0.1:{port}", process, log, headers)
    try:
        up = eventually(
            lambda: process.poll() is not None or httpx.get(f"{running.url}/health").status_code == 200, 300
        )
        assert up, log.read_text()[-5000:]
        assert process.poll() is None, log.read_text()[-5000:]
        yield running
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)  # a supervised server ends by itself in 45
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
