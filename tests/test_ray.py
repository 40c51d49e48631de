"""The Ray Serve application as it is deployed: two replicas of the planned model, and one of them killed under load."""

import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from vllm_ext.embedded.model import fetch_planned
from vllm_ext.process import free_port

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "deploy" / "ray_serve"
SERVE = Path(sys.executable).parent / "serve"
START_SECONDS = 300
REQUESTS, CLIENTS = 32, 4
QUESTION = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 32, "ignore_eos": True}


@contextmanager
def process(*command: str, log: Path):
    """Run it for as long as the block, then end it with all that it started."""
    environment = os.environ | {
        # One machine alone, so that Ray's own ports are on loopback. To Ray two engines, the ingress and what runs
        # beside them are a CPU each; two cores run them all the same.
        "RAY_ADDRESS": "local",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 6}',
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with log.open("w") as file:
        # In the application's folder, as its users do: Ray's workers import app.py from there.
        started = psutil.Popen(command, cwd=FOLDER, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            yield started
        finally:
            family = started.children(recursive=True) if started.poll() is None else []
            with suppress(psutil.NoSuchProcess):
                started.terminate()
            _, left = psutil.wait_procs([started, *family], timeout=30)
            for each in left:
                with suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.fixture(scope="module")
def application(tmp_path_factory):
    """`serve run` with the example's own configuration; gives its process, a URL and the model."""
    if not SERVE.exists():
        pytest.skip("ray[serve] is not installed: make test-all installs it")
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    config = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    arguments = config["applications"][0]["args"]
    arguments["model"] = str(fetch_planned())
    # In bfloat16 a near tie may fall otherwise in another batch.
    arguments["engine"] |= {"enforce_eager": True, "max_model_len": 1024, "dtype": "float32"}
    arguments["environment"] |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(SERVE), "run", "--app-dir", str(FOLDER), str(folder / "serve.yaml")]
    with process(*command, log=folder / "log") as cluster:
        url = f"http://127.0.0.1:{port}"
        wait_for_answer(cluster, url, arguments["name"], folder / "log")
        yield cluster, url, arguments["name"]


def wait_for_answer(serve: psutil.Popen, url: str, model: str, log: Path) -> None:
    """Return once the application answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and serve.poll() is None:
        with suppress(httpx.HTTPError):
            if complete(url, model).status_code == 200:
                return
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def complete(url: str, model: str, **more) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=QUESTION | {"model": model} | more, timeout=120, trust_env=False)


def replicas(cluster: psutil.Process) -> list[psutil.Process]:
    """Those that hold an engine, by the engine's process."""
    engines = [each for each in cluster.children(recursive=True) if "EngineCore" in "".join(each.cmdline())]
    return [engine.parent() for engine in engines]


def test_the_openai_routes_answer(application):
    _, url, model = application
    assert [each["id"] for each in httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]] == [model]
    whole = complete(url, model).json()["choices"][0]["text"]
    streamed = complete(url, model, stream=True).text
    assert streamed.rstrip().endswith("data: [DONE]")
    assert streamed.count('"text"') > 3
    chat = {"model": model, "messages": [{"role": "user", "content": "What is the capital of Italy?"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat | {"max_tokens": 8}, timeout=120, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"]
    assert whole == complete(url, model).json()["choices"][0]["text"]


def test_a_killed_replica_is_replaced_and_the_other_answers(application):
    cluster, url, model = application
    before = replicas(cluster)
    assert len(before) == 2
    expected = complete(url, model).json()["choices"][0]["text"]

    def ask(_: int) -> str:
        try:
            answer = complete(url, model)
        except httpx.HTTPError as error:
            return repr(error)
        if answer.status_code != 200:
            return f"HTTP {answer.status_code}"
        return "answered" if answer.json()["choices"][0]["text"] == expected else "wrong"

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, number) for number in range(REQUESTS)]
        while sum(each.done() for each in asked) < CLIENTS:
            time.sleep(0.01)
        victim = before[0]
        for process in [*victim.children(recursive=True), victim]:
            process.kill()
        outcomes = [each.result() for each in asked]
    print(f"{REQUESTS} requests, {CLIENTS} at once, one of two replicas killed: {dict(Counter(outcomes))}")
    # Ray Serve sends a request to one replica and does not ask another: those that the killed one held get an error.
    failed = [outcome for outcome in outcomes if outcome != "answered"]
    assert len(failed) <= CLIENTS
    assert all(outcome.startswith("HTTP 5") for outcome in failed), failed
    assert outcomes[-CLIENTS:] == ["answered"] * CLIENTS
    end = time.monotonic() + START_SECONDS
    while len(replicas(cluster)) < 2 and time.monotonic() < end:
        time.sleep(1)
    assert len(replicas(cluster)) == 2
    assert complete(url, model).json()["choices"][0]["text"] == expected
