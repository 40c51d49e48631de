"""Load on real vLLM: the client's figures beside the server's own, and every way in that needs a real server."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from itertools import groupby

import httpx
import numpy as np
import pytest
import yaml

from loadtests.answer import read_answers
from loadtests.client import open_client
from loadtests.run import LOCUSTFILE, locust
from loadtests.tokenizers import find_texts
from loadtests.workloads import Workload
from tests.servers import eventually
from vllm_ext.process import free_port

COMMAND = [sys.executable, "-m", "vllm_ext.cli.main", "loadtest", "compare"]
LOCUST = [sys.executable, "-m", "locust", "--headless", "--only-summary"]
WITHIN = 0.05
ANY = ["--client-bound=inf"]  # as other work of this machine may hold the client up


@pytest.fixture(scope="module")
def server(served_smollm2):
    return served_smollm2


def histograms(server) -> dict[str, np.ndarray]:
    """Each histogram's sum and count."""
    names = ("time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency")
    return {
        name: np.array([server.metric(f"vllm:{name}_seconds_{part}") for part in ("sum", "count")]) for name in names
    }


def means(server, records, lines, trace):
    """Mean times of a run by the client and by the server, after seeing that both count the same requests; and how many
    tokens came with the one before.
    """
    assert server.idle()
    before = histograms(server)
    asked = ["--arrival=constant", "--workload=trace", f"--trace={trace}", f"--records={records}", "--users=1", *ANY]
    assert locust(server.url, asked) == 0
    assert server.idle()
    counted = {name: after - before[name] for name, after in histograms(server).items()}
    answers = read_answers([records])
    assert [(answer.prompt_tokens, answer.answer_tokens) for answer in answers] == [
        (line["prompt_tokens"], line["answer_tokens"]) for line in lines
    ]
    clients = {
        "time_to_first_token": [answer.ttft for answer in answers],
        "inter_token_latency": np.concatenate([answer.gaps for answer in answers]),
        "request_time_per_output_token": [answer.tpot for answer in answers],
        "e2e_request_latency": [answer.latency for answer in answers],
    }
    counts = {name: len(each) for name, each in clients.items()}
    # Two tokens share a chunk where the server was late to write the first.
    shared = int(counted["inter_token_latency"][1]) - counts.pop("inter_token_latency")
    assert shared >= 0
    assert {name: counted[name][1] for name in counts} == counts
    servers = {name: total / count for name, (total, count) in counted.items()}
    return {name: np.mean(each) for name, each in clients.items()}, servers, shared


def test_the_clients_figures_are_the_servers_own(server, tmp_path):
    """Means within 5%. vLLM counts from when it has read a request to when its output is ready to be written.

    So HTTP is in the client's times alone: a few milliseconds, of first tokens that take some hundred; or more, where
    this machine has other work, which is why a run that is off is made again.
    """
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"arrival": 0.5 + 1.5 * place, "prompt_tokens": 400 + 20 * place, "answer_tokens": 32} for place in range(10)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):  # a server's first answer takes longer, in what it does before it counts
        body = {"prompt": list(range(1000, 1400)), "max_tokens": 4, "stream": True}
        server.post("/v1/completions", body).raise_for_status()
    for number in range(3):
        clients, servers, shared = means(server, tmp_path / f"records-{number}.jsonl", lines, trace)
        # Nothing that the server counts can be missing in what the client saw.
        assert clients["time_to_first_token"] > servers["time_to_first_token"]
        assert clients["e2e_request_latency"] > servers["e2e_request_latency"]
        if shared < 0.03 * 310 and clients == pytest.approx(servers, rel=WITHIN):
            return
    assert shared < 0.03 * 310
    assert clients == pytest.approx(servers, rel=WITHIN)


def test_chat_is_asked_in_exact_lengths_by_the_servers_tokenize(server, tmp_path):
    """Plain Locust, headless: what the server counts is what was to be asked."""
    records = tmp_path / "records.jsonl"
    asked = ["--api=chat", "--workload=chat", "--scale=0.25", "--seed=5", f"--records={records}", "--client-bound=inf"]
    run = ["--users=2", "--spawn-rate=2", "--run-time=6s", "--stop-timeout=20s"]
    command = [*LOCUST, "-f", str(LOCUSTFILE), "--host", server.url, *asked, *run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "note: no tokenizer" not in done.stderr
    with open_client(server.url) as client:
        (model,) = client.get("/v1/models").json()["data"]
        texts = find_texts(client, model["id"], "chat")
    assert texts.exact
    workload = Workload("chat", model["id"], "chat", seed=5, scale=0.25, texts=texts)
    answers = read_answers([records])
    assert len(answers) >= 2
    for answer in answers:
        request = workload.request(int(answer.id.rsplit("-", 1)[1]))
        assert (answer.prompt_tokens, answer.answer_tokens) == (request.prompt_tokens, request.answer_tokens)


SHORT = ["--scale", "0.1", "--pairs", "1", "--ttft", "2", "--itl", "1", "--start", "6"]
SHORT += ["--warmup", "0.5", "--duration", "2", "--minutes", "1", "--client-bound", "1"]
CHAT = [*SHORT, "--workload", "chat"]
TALK = ["--workload=conversation", "--turns=3", "--think=0.5", "--scale=0.5"]


def test_conversations_find_their_turns_in_the_cache_as_the_server_counts(server, tmp_path):
    """All before a turn, to the block, by the server's own counters; and nothing else, as texts are new."""
    assert server.idle()
    names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    before = [server.metric(name) for name in names]
    records = tmp_path / "records.jsonl"
    sent = ["--arrival=constant", "--rate=1.5", "--duration=8", "--warmup=0", f"--records={records}", "--users=1", *ANY]
    assert locust(server.url, [*TALK, "--seed=77", *sent]) == 0
    assert server.idle()
    hits, queries = (server.metric(name) - each for name, each in zip(names, before, strict=True))
    (info,) = (row for row in server.metrics() if row.startswith("vllm:cache_config_info"))
    block = int(re.search(r'block_size="(\d+)"', info)[1])
    answers = read_answers([records])
    named = {answer.id: answer for answer in answers}
    known = []
    for answer in answers:
        name, turn = answer.id.rsplit(".", 1)
        if answer.times and (earlier := named.get(f"{name}.{int(turn) - 1}")):  # else it was entered here: all is new
            # The keys of an answer's last token were never needed.
            known.append((earlier.prompt_tokens + earlier.answer_tokens - 1) // block * block)
    assert len(known) >= 3
    assert sum(known) <= hits <= queries
    assert sum(answer.prompt_tokens for answer in answers if answer.error is None) <= queries
    if all(answer.times for answer in answers):
        assert (hits, queries) == (sum(known), sum(answer.prompt_tokens for answer in answers))


def test_a_comparisons_hit_rates_are_the_servers(server, tmp_path):
    """Of both sides together, as both are the same server; what the warm-ups asked is the server's alone."""
    names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    before = [server.metric(name) for name in names]
    command = [*COMMAND, server.url, server.url, "--out", str(tmp_path / "out"), *SHORT, *TALK, "--start", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    hits, queries = (server.metric(name) - each for name, each in zip(names, before, strict=True))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    runs = report["runs"]
    assert 0 < sum(run["prefix_queries"] for run in runs) <= queries
    assert 0 <= sum(run["prefix_hits"] for run in runs) <= hits
    for side, rate in report["workloads"]["conversation"]["prefix_hit_rate"].items():
        own = [run for run in runs if run["side"] == side]
        assert rate == sum(run["prefix_hits"] for run in own) / sum(run["prefix_queries"] for run in own)
        assert 0 <= rate < 1


def test_a_ramp_of_users(server, tmp_path):
    """One user, then three, with plain Locust."""
    records = tmp_path / "records.jsonl"
    files = f"{LOCUSTFILE},{LOCUSTFILE.with_name('ramp.py')}"
    steps = ["--ramp-from=1", "--ramp-to=3", "--ramp-steps=2", "--ramp-seconds=4", "--stop-timeout=20s"]
    command = [
        *LOCUST,
        "-f",
        files,
        "--host",
        server.url,
        *steps,
        "--scale=0.1",
        f"--records={records}",
        "--client-bound=inf",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = read_answers([records])
    together = [sum(each.sent <= answer.sent < each.end for each in answers) for answer in answers]
    assert together[0] == 1
    assert max(together) == 3
    assert together.index(3) > together.index(1)


@contextmanager
def prometheus(folder, instance: str):
    """A real one that scrapes that server once a second."""
    config = {"scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [instance]}]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}} | config))
    port = free_port()
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            query = {"query": f'up{{instance="{instance}"}}'}
            asked = f"{url}/api/v1/query"
            assert eventually(lambda: httpx.get(asked, params=query).raise_for_status().json()["data"]["result"])
            yield url
        finally:
            process.terminate()
            process.wait(30)


def test_metrics_are_taken_from_a_prometheus(server, tmp_path):
    instance = httpx.URL(server.url).netloc.decode()
    with prometheus(tmp_path, instance) as source:
        command = [
            *COMMAND,
            server.url,
            server.url,
            "--workload",
            "chat",
            "--prometheus",
            source,
            "--out",
            str(tmp_path / "out"),
            *SHORT,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for samples in report["metrics"].values():
        assert len(samples) > 10
        assert samples[-1]["time"] - samples[0]["time"] > 10
        assert max(sample["running"] for sample in samples) >= 1
        assert 0 < max(sample["kv_cache_usage"] for sample in samples) <= 1
        assert samples[-1]["generation_tokens"] > samples[0]["generation_tokens"]
    whole = [run for run in report["runs"] if not run["figures"]["given_up"]]  # the others may end before a scrape
    assert all(run["kv_cache_usage"] > 0 for run in whole)
    assert {run["side"] for run in report["runs"] if (run["kv_cache_usage"] or 0) > 0} == {"A", "B"}
    assert report["kv_capacity_tokens"]["A"] == report["kv_capacity_tokens"]["B"] > 0


@pytest.mark.slow  # as two engines start, one after the other
def test_each_side_is_started_for_its_turn(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    options = ["--minutes", "6", "--in-turn", "--max-model-len", "512", "--enforce-eager"]  # time for two turns
    command = [
        *COMMAND,
        str(smollm2),
        f"{smollm2} --skip 28-29",
        "--workload",
        "chat",
        "--out",
        str(tmp_path / "out"),
        *SHORT,
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "B serves" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    metrics, capacity = report["metrics"], report["kv_capacity_tokens"]
    times = sorted((sample["time"], side) for side, samples in metrics.items() for sample in samples)
    assert [side for side, _ in groupby(side for _, side in times)][:3] == ["A", "B", "A"]  # never both at once
    assert capacity["B"] / capacity["A"] == pytest.approx(30 / 28, rel=0.01)
    assert {run["side"] for run in report["runs"]} == {"A", "B"}
