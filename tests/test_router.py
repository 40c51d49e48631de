"""Two replicas behind vllm-router, one of them ended or killed under load: every request is accounted for."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import helm_python
import httpx
import psutil
import pytest
import yaml

from vllm_ext.embedded.model import fetch_planned
from vllm_ext.process import free_port, running

pytestmark = pytest.mark.slow

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "vllm-ext"
ROUTER = Path(sys.executable).parent / "vllm-router"
REPLICAS = VICTIM, SURVIVOR = "replica-a", "replica-b"
REQUESTS, CLIENTS, HURT_AFTER = 80, 8, 16
QUESTION = {
    "model": "SmolLM2",
    "messages": [{"role": "user", "content": "Tell me of the sea."}],
    "temperature": 0,
    "max_tokens": 48,
    "ignore_eos": True,
}


@dataclass
class Answer:
    """What came of one request."""

    streamed: bool
    status: int = 0
    replica: str | None = None
    """Who answers: each replica gives its name as the role of its messages."""
    text: str = ""
    complete: bool = False
    error: str = ""
    began: float = 0.0
    ended: float = 0.0

    @property
    def outcome(self) -> str:
        """Answered in whole, cut while it was streamed, or lost: without an answer."""
        if self.complete:
            return "answered"
        return "cut" if self.streamed and self.status == 200 else "lost"


def ask(client: httpx.Client, answer: Answer) -> Answer:
    """Ask, and note in `answer` what comes, as it comes."""
    streamed, answer.began = answer.streamed, time.monotonic()
    try:
        with client.stream("POST", "/v1/chat/completions", json=QUESTION | {"stream": streamed}) as response:
            answer.status = response.status_code
            if streamed and response.status_code == 200:
                read_stream(response, answer)
            else:
                body = response.read()
                if response.status_code == 200:
                    message = json.loads(body)["choices"][0]["message"]
                    answer.replica, answer.text, answer.complete = message["role"], message["content"], True
                else:
                    answer.error = body.decode()
    except (httpx.HTTPError, ValueError) as error:
        answer.error = repr(error)
    answer.ended = time.monotonic()
    return answer


def read_stream(response: httpx.Response, answer: Answer) -> None:
    for line in response.iter_lines():
        if line == "data: [DONE]":
            answer.complete = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "choices" not in chunk:  # an error, in the stream
                answer.error = line
                continue
            delta = chunk["choices"][0]["delta"]
            answer.replica = answer.replica or delta.get("role")
            answer.text += delta.get("content") or ""


@dataclass
class Load:
    """What came of all requests, and what the victim streamed when it was hurt."""

    answers: list[Answer]
    streaming: list[Answer]
    hurt: float

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    @property
    def late(self) -> list[Answer]:
        """Those asked after the victim was hurt."""
        return [answer for answer in self.answers if answer.began > self.hurt]

    @property
    def told(self) -> list[tuple]:
        """Of those without a whole answer."""
        return [(each.outcome, each.status, each.replica, each.error) for each in self.answers if not each.complete]


def load(client: httpx.Client, victim: str, hurt: Callable[[], None]) -> Load:
    """Ask, half of it streamed, and call `hurt` once the victim is in the middle of a stream."""
    answers = [Answer(streamed=number % 2 == 0) for number in range(REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, client, answer) for answer in answers]
        streaming = wait_for_stream(answers, victim)
        hurt()
        done = Load(answers, streaming, time.monotonic())
        for each in asked:
            each.result()
    print(f"{REQUESTS} requests, {CLIENTS} at once, half streamed: {dict(done.outcomes)}", done.told)
    # Both answered before, and every whole answer is the right one, whoever gave it.
    whole = [answer for answer in answers if answer.complete]
    assert {answer.replica for answer in whole if answer.ended < done.hurt} == set(REPLICAS)
    assert {answer.text for answer in whole} == {ask(client, Answer(streamed=False)).text}
    return done


def wait_for_stream(answers: list[Answer], replica: str) -> list[Answer]:
    """Return once `replica` is in the middle of a stream, after some were answered: all that it streams."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        streaming = [each for each in answers if each.replica == replica and each.streamed and not each.ended]
        warm = sum(each.complete for each in answers) >= HURT_AFTER
        if warm and streaming and all(len(each.text) > 8 for each in streaming):
            return streaming
        time.sleep(0.001)
    raise AssertionError(f"{replica} streamed nothing")


@contextmanager
def router(*urls: str):
    """vllm-router over these servers, with the health checks of the chart."""
    port, metrics = free_port(), free_port()
    health = ["--health-check-endpoint", "/ready", "--health-check-interval-secs", "1"]
    options = ["--policy", "round_robin", "--health-failure-threshold", "1", *health]
    command = [str(ROUTER), "--worker-urls", *urls, "--port", str(port), "--prometheus-port", str(metrics), *options]
    with running(command, port) as url:
        yield url


def processes_of(url: str) -> list[psutil.Process]:
    """The supervisor of the server that listens there, which a pod's end is told to, and all that it started."""
    port = httpx.URL(url).port
    (pid,) = {each.pid for each in psutil.net_connections("tcp") if each.laddr.port == port and each.status == "LISTEN"}
    supervisor = psutil.Process(pid).parent()
    return [supervisor, *supervisor.children(recursive=True)]


@contextmanager
def replica(name: str):
    """The planned model, on one core; its URL."""
    if not ROUTER.exists():
        pytest.skip("vllm-router is not installed: make test-all installs it")
    port = free_port()
    options = ["--served-model-name", "SmolLM2", "--enforce-eager", "--max-model-len", "1024"]
    options += ["--dtype", "float32"]  # in bfloat16 a near tie may fall otherwise in another batch
    command = [sys.executable, "-m", "vllm_ext.cli.main", "serve", str(fetch_planned()), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        with running([*command, "--response-role", name, "--port", str(port)], port) as url:
            yield url


@pytest.fixture(scope="module")
def survivor():
    with replica(SURVIVOR) as url:
        yield url


@pytest.fixture
def victim():
    with replica(VICTIM) as url:
        yield url


def test_the_probes_and_options_of_the_chart_are_the_router_s(survivor):
    with helm_python.Chart.load(CHART) as chart:
        text = chart.render(values={"router": {"enabled": True}}, name="demo")["vllm-ext/templates/router.yaml"]
    (pod,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "Deployment")
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    told = subprocess.run([ROUTER, "--help"], capture_output=True, text=True, check=True).stdout
    for argument in container["args"]:
        assert not argument.startswith("--") or argument.split("=")[0] in told
    with router(survivor) as url:
        for probe in ("readinessProbe", "livenessProbe"):
            assert httpx.get(url + container[probe]["httpGet"]["path"], trust_env=False).status_code == 200


def test_a_replica_that_is_ended_loses_nothing(survivor, victim):
    """As Kubernetes ends a pod: it finishes what it was asked, and the other answers the rest."""
    supervisor = processes_of(victim)[0]
    with router(survivor, victim) as url, httpx.Client(base_url=url, timeout=120) as client:
        done = load(client, VICTIM, lambda: supervisor.send_signal(signal.SIGTERM))
    assert done.outcomes == {"answered": REQUESTS}, done.told
    assert {answer.replica for answer in done.streaming} == {VICTIM}
    assert len(done.late) > CLIENTS
    # It may have taken one more before it heard of its end.
    assert {answer.replica for answer in done.late if answer.began > done.hurt + 1} == {SURVIVOR}
    assert supervisor.wait(60) == 0


def test_a_killed_replica_loses_only_what_it_was_streaming(survivor, victim):
    processes = processes_of(victim)

    def kill() -> None:
        for process in processes:
            process.send_signal(signal.SIGKILL)

    with router(survivor, victim) as url, httpx.Client(base_url=url, timeout=120) as client:
        done = load(client, VICTIM, kill)
    assert done.outcomes["lost"] == 0, done.told
    # Cut are those, and only those, that the killed replica had begun to stream.
    cut = [answer for answer in done.answers if answer.outcome == "cut"]
    assert all(answer.replica == VICTIM and answer.began < done.hurt for answer in cut), done.told
    assert 1 <= len(done.streaming) <= len(cut) <= CLIENTS
    assert len(done.late) > CLIENTS
    assert {(answer.outcome, answer.replica) for answer in done.late} == {("answered", SURVIVOR)}
