"""Locust's figures beside what a server of known times really did, at 50 users."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from loadtests.answer import CUT, read_answers
from loadtests.run import LOCUSTFILE, locust
from vllm_ext.process import free_port, running

STOPPING = Path(__file__).with_name("stopping_client.py")
USERS = 50
WITHIN = 0.002


@pytest.fixture(scope="module")
def url():
    port = free_port()
    with running([sys.executable, "-m", "tests.token_server", str(port), "--gap", "0.05"], port) as url:
        yield url


def measured(url, folder, model, *options):
    """Run Locust; returns its exit code, the client's answers and what the server says of the same ones."""
    given = [f"--model={model}", f"--records={folder / 'records.jsonl'}", "--scale=0.2", "--client-bound=inf", *options]
    code = locust(url, given, limit=120)
    answers = [answer for answer in read_answers([folder / "records.jsonl"]) if answer.error != CUT]
    sent = {each["id"]: each for each in httpx.get(f"{url}/sent", timeout=60).json()}
    return code, answers, [sent.get(answer.id) for answer in answers]


@pytest.mark.slow  # as it wants a machine without other work
@pytest.mark.parametrize("model", ["constant", "jittered", "bursts", "stalls"])
def test_times_are_the_servers_within_two_milliseconds(url, tmp_path, model):
    """By the median, since other work of the machine delays a few; the server says when it really sent."""
    code, answers, sent = measured(
        url, tmp_path, model, f"--users={USERS}", "--spawn-rate=25", "--run-time=6s", f"--seed={len(model)}"
    )
    assert code == 0
    assert len(answers) > USERS
    assert max(overlap(answers)) >= USERS * 0.9
    first = [answer.ttft - (each["times"][0] - answer.intended) for answer, each in zip(answers, sent, strict=True)]
    total = [answer.times[-1] - each["times"][-1] for answer, each in zip(answers, sent, strict=True)]
    gaps = np.concatenate([answer.gaps - np.diff(each["times"]) for answer, each in zip(answers, sent, strict=True)])
    assert np.median(np.abs(first)) < WITHIN
    assert np.median(np.abs(total)) < WITHIN
    assert np.median(np.abs(gaps)) < WITHIN
    # What the server was told to do, too: a stall is in the largest gap, and bursts have a fourth of the chunks.
    assert [answer.answer_tokens for answer in answers] == [each["tokens"] for each in sent]
    if model == "stalls":
        assert np.median([answer.gaps.max() for answer in answers]) == pytest.approx(0.55, abs=0.02)
    if model == "bursts":
        assert all(len(answer.times) == -(-answer.answer_tokens // 4) for answer in answers)
        assert np.median(np.concatenate([answer.gaps for answer in answers])) == pytest.approx(0.2, abs=0.01)
    if model != "stalls":
        expected = 0.05 if model != "bursts" else None
        if expected:
            assert np.median([answer.tpot for answer in answers]) == pytest.approx(expected, rel=0.1)


def overlap(answers):
    """How many were under way at each start."""
    return [sum(each.sent <= answer.sent < each.end for each in answers) for answer in answers]


@pytest.mark.parametrize(
    ("model", "kind"),
    [("errors", "HTTP 503"), ("drops", "dropped"), ("event", "error event"), ("nousage", "no usage")],
)
def test_errors_are_named_by_kind_and_fail_the_run(url, tmp_path, model, kind):
    schedule = ["--users=1", "--arrival=constant", "--rate=5", "--duration=1", "--scale=0.05"]
    code, answers, _ = measured(url, tmp_path, model, *schedule)
    assert code == 1
    assert len(answers) >= 5
    assert {answer.error for answer in answers} == {kind}


def test_refused_connections_are_an_error_of_the_start(tmp_path):
    with pytest.raises(ValueError, match="Locust ended with 2: error: "):
        locust(f"http://127.0.0.1:{free_port()}", ["--users=1", "--run-time=2s"])


def test_locusts_own_rows(url, tmp_path):
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--users", "4"]
    files = ["--csv", str(tmp_path / "run"), "--html", str(tmp_path / "run.html"), "--json-file", str(tmp_path / "run")]
    chat = ["--api", "chat", "--workload", "mixed", "--scale", "0.05", "--run-time", "4s", "--client-bound=inf"]
    done = subprocess.run([*command, *files, *chat], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "HTTP Request" not in done.stderr  # httpx would have a line for each
    rows = {row["method"]: row for row in json.loads((tmp_path / "run.json").read_text())}
    assert set(rows) == {"POST", "TTFT", "ITL", "TPOT", "tokens in", "tokens out"}
    assert {row["name"] for row in rows.values()} == {"/v1/chat/completions mixed"}
    assert rows["POST"]["num_requests"] == rows["tokens out"]["num_requests"] == rows["TTFT"]["num_requests"] > 0
    assert 50 <= rows["TTFT"]["min_response_time"] < 100
    table = (tmp_path / "run_stats.csv").read_text()
    assert all(f"{kind},/v1/chat/completions mixed" in table for kind in rows)
    assert "TTFT" in (tmp_path / "run.html").read_text()


def test_a_run_that_ends_while_rows_are_written_has_each_answer_once(url, tmp_path):
    records, rows = tmp_path / "records.jsonl", tmp_path / "run.json"
    command = [sys.executable, "-m", "locust", "-f", f"{LOCUSTFILE},{STOPPING}", "--host", url, "--headless"]
    asked = ["--users=1", "--run-time=60s", "--client-bound=inf", f"--records={records}", f"--json-file={rows.stem}"]
    done = subprocess.run([*command, *asked, "--scale=0.3"], cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0
    answer, *cut = read_answers([records])
    assert len(answer.gaps) > 32  # so that its rows are written in more turns than one
    assert all(each.id != answer.id and each.error == CUT for each in cut)
    counts = {row["method"]: row["num_requests"] for row in json.loads(rows.read_text())}
    assert counts == {"POST": 1, "TTFT": 1, "ITL": len(answer.gaps), "TPOT": 1, "tokens in": 1, "tokens out": 1}


def test_master_and_two_workers(url, tmp_path):
    """They share one schedule: every request once, half of them each, and exit codes that say how it went."""
    base = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
    port, records = str(free_port()), tmp_path / "records.jsonl"
    asked = [
        "--scale=0.05",
        "--arrival=constant",
        "--rate=20",
        "--duration=3",
        f"--records={records}",
        "--client-bound=inf",
    ]
    master = [*base, "--master", "--headless", "--expect-workers=2", "--expect-workers-max-wait=60", "--users=2"]
    bound = [f"--master-bind-port={port}", "--master-bind-host=127.0.0.1", "--host", url]
    processes = [subprocess.Popen([*master, *bound, *asked])]
    processes += [subprocess.Popen([*base, "--worker", f"--master-port={port}"]) for _ in range(2)]
    try:
        assert [process.wait(60) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    shares = [read_answers([tmp_path / f"records-{worker}.jsonl"]) for worker in range(2)]
    numbers = [{int(answer.id.rsplit("-", 1)[1]) for answer in share} for share in shares]
    assert numbers[0].isdisjoint(numbers[1])
    assert set(range(60)) <= numbers[0] | numbers[1]
    assert min(map(len, numbers)) >= 30
