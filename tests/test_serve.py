"""The real model over HTTP, and what a mistake gets: one line, exit code 2."""

import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from model_executors.attention_plan import LayerPlan
from tests.command import complaint, refused
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.dtypes import fast_dtype
from vllm_ext.embedded.model import fetch_heads
from vllm_ext.planned_checkpoint import write_planned
from vllm_ext.process import free_port, running

COMMAND = [sys.executable, "-m", "vllm_ext.cli.main"]
ITEM_BYTES = {"auto": 2, "float32": 4}[fast_dtype()]
QUESTION = {
    "model": "SmolLM2",
    "messages": [
        # One worked example: asked out of the blue, this small model with 27-29 skipped rambles in French, in plain
        # transformers just as here.
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.fixture(scope="module")
def url(served_smollm2):
    return served_smollm2.url


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key="none")


def test_answers_with_paris(client):
    answer = client.chat.completions.create(**QUESTION)
    assert answer.choices[0].message.content == "The capital of France is Paris."


def test_streams_the_same_answer(client):
    whole = client.chat.completions.create(**QUESTION).choices[0].message.content
    chunks = client.chat.completions.create(**QUESTION, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(pieces) > 3
    assert "".join(pieces) == whole


def test_metrics_say_what_the_plan_saves(url):
    rows = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("vllm_ext_")
    )
    labels = '{engine="0",model_name="SmolLM2"}'
    assert float(rows['vllm_ext_layers{engine="0",kind="full",model_name="SmolLM2"}']) == 27
    assert float(rows['vllm_ext_layers{engine="0",kind="skip",model_name="SmolLM2"}']) == 3
    assert float(rows["vllm_ext_kv_cache_token_bytes" + labels]) == 27 * 2 * 3 * 64 * ITEM_BYTES
    assert float(rows["vllm_ext_stock_kv_cache_token_bytes" + labels]) == 30 * 2 * 3 * 64 * ITEM_BYTES
    # In each layer: Q and O of 576 x 576, K and V of 576 x 192.
    assert float(rows["vllm_ext_weight_dropped_bytes" + labels]) == 3 * ITEM_BYTES * (2 * 576 * 576 + 2 * 576 * 192)


def test_a_planned_checkpoint_is_served_with_nothing_else_said(smollm2, client, tmp_path):
    source = Checkpoint.open(str(smollm2), weights=True)
    write_planned(source, source.planned(dict.fromkeys([27, 28, 29], LayerPlan("skip"))), tmp_path / "planned")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "planned")]
    options = ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "1024"]
    with running([*command, *options], port) as url:
        body = QUESTION | {"model": str(tmp_path / "planned"), "logprobs": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        metrics = httpx.get(f"{url}/metrics").text
    assert answer["message"]["content"] == "The capital of France is Paris."
    assert answer["message"]["content"] == client.chat.completions.create(**QUESTION).choices[0].message.content
    (skipped,) = [line for line in metrics.splitlines() if "vllm_ext_layers{" in line and 'kind="skip"' in line]
    assert skipped.endswith(" 3.0")


def test_character_heads_count_their_rows(client):
    """At an agreement of 0.98 some rows are spelled and some fall back, and /metrics tells which."""
    port = free_port()
    options = ["--port", str(port), "--served-model-name", "SmolLM2", "--enforce-eager", "--max-model-len", "1024"]
    command = [*COMMAND, "serve", str(fetch_heads()), "--agreement", "0.98", *options]
    with running(command, port) as url:
        pattern = QUESTION | {"structured_outputs": {"regex": r"\d{3}-\d{3}"}}
        held = httpx.post(f"{url}/v1/chat/completions", json=pattern, timeout=120).json()["choices"][0]
        body = QUESTION | {"logprobs": True, "top_logprobs": 3, "max_tokens": 64, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
        metrics = httpx.get(f"{url}/metrics").text
    assert re.fullmatch(r"\d{3}-\d{3}", held["message"]["content"])
    assert len(answer["logprobs"]["content"]) == 64
    assert all(len(each["top_logprobs"]) == 3 for each in answer["logprobs"]["content"])
    rows = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("vllm_ext_head_"))
    own, stock = (
        float(rows[f'vllm_ext_head_rows_total{{head="{head}",model_name="SmolLM2"}}']) for head in ("own", "stock")
    )
    assert own > 0
    assert stock > 0
    assert own + stock >= 64
    # Of every row that was spelled, believed or not.
    assert float(rows['vllm_ext_head_confidence_count{model_name="SmolLM2"}']) == own + stock
    assert float(rows['vllm_ext_head_seconds_total{model_name="SmolLM2"}']) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "character"], "--head character: "),
        (["--agreement", "0.98"], "--agreement 0.98: it is for character heads"),
    ],
)
def test_refuses_heads_that_are_not_there(smollm2, options, message):
    assert message in refused("serve", smollm2, *options)


def test_refuses_an_agreement_that_was_not_calibrated():
    message = refused("serve", fetch_heads(), "--agreement", "0.981")
    assert "was calibrated for 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1; take one of them" in message


@pytest.mark.nightly
def test_data_parallel(smollm2, monkeypatch):
    """Two engines, a core each, behind one address: each answers, and both as one alone does."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    port = free_port()
    options = ["--port", str(port), "--served-model-name", "SmolLM2", "--enforce-eager", "--max-model-len", "1024"]
    plan = ["--window", "0-9:256", "--skip", "28-29", "--freeze", "22-27"]
    command = [*COMMAND, "serve", str(smollm2), *plan, *options, "--data-parallel-size", "2"]
    with running(command, port) as url:
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(httpx.post, f"{url}/v1/chat/completions", json=QUESTION, timeout=120) for _ in range(4)
            ]
            given = [answer.result().json()["choices"][0]["message"]["content"] for answer in asked]
        metrics = httpx.get(f"{url}/metrics").text
    assert given == ["The capital of France is Paris."] * 4
    finished = [
        line for line in metrics.splitlines() if line.startswith("vllm:request_success_total") and "stop" in line
    ]
    assert [float(line.rsplit(" ", 1)[1]) > 0 for line in finished] == [True, True]
    skipped = [line for line in metrics.splitlines() if "vllm_ext_layers{" in line and 'kind="skip"' in line]
    assert [line.rsplit(" ", 1)[1] for line in skipped] == ["2.0", "2.0"]


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("30", "layer 30 does not exist; the model has layers 0-29"),
        ("", "'' is no layer or range"),
        ("3-5,4", "layer 4 is named twice"),
        ("0-29", "skips all 30 layers"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "plan", "bench"])
def test_refuses_a_plan_that_does_not_fit(smollm2, tmp_path, command, skip, message):
    more = ["--out", tmp_path / "out"] if command == "plan" else []
    assert message in refused(command, smollm2, "--skip", skip, *more)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_damaged_checkpoint_before_starting(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models("Llama"), tmp_path / "llama")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "model.safetensors is damaged" in refused("serve", folder, "--skip", "5")
    assert "no such folder" in refused("serve", tmp_path / "nothing")


def test_refuses_to_run_code_from_a_checkpoint(tiny_models, tmp_path):
    model = tiny_models("Llama")
    port = ["--port", free_port()]
    assert "add --allow-code-from-checkpoint" in refused("serve", model, *port, "--trust-remote-code")
    assert "convert them to safetensors" in refused("serve", model, *port, "--load-format", "pt")
    pickled = shutil.copytree(model, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "no *.safetensors weights in that folder; convert" in refused("serve", pickled, *port)


def test_refuses_keys_that_others_would_see_or_that_are_none(tiny_models, tmp_path):
    model = tiny_models("Llama")
    port = ["--port", free_port()]
    assert "use --api-key-file, or VLLM_API_KEY" in refused("serve", model, *port, "--api-key", "secret")
    (tmp_path / "keys").write_text("# none yet\n\n")
    assert "it has no key" in refused("serve", model, *port, "--api-key-file", tmp_path / "keys")
    assert "cannot be read" in refused("serve", model, *port, "--api-key-file", tmp_path / "nothing")


def test_refuses_limits_that_mean_nothing(tiny_models):
    assert "give that too" in refused("serve", tiny_models("Llama"), "--max-queued-requests", "4")


@pytest.mark.parametrize("listens", [True, False], ids=["listens", "starts"])
def test_refuses_a_port_in_use(tiny_models, listens):
    """Also one of a vLLM that has yet to load its weights: it holds its port from the start, and listens at the end."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen on 127.0.0.1" in refused("serve", tiny_models("Llama"), "--port", port)
    assert "--port 99999" in refused("serve", tiny_models("Llama"), "--port", "99999")


def test_passes_on_what_is_refused_while_vllm_is_configured(tiny_models):
    """In a process of its own, which vLLM's server would not leave as it was."""
    told = ["serve", tiny_models("Llama"), "--skip", "5", "--skip-tokenizer-init", "--port", free_port()]
    for options, message in (
        (["--cpu-offload-gb", "1"], "weight offloading does not work with an attention plan"),
        (["--max-model-len", "4096"], "max_model_len"),
    ):
        command = [*COMMAND, *map(str, told), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert message in complaint(done)
        assert done.stdout + done.stderr == complaint(done) + "\n"  # and nothing that vLLM, Triton or nanobind print
