"""GuideLLM's own file as a side: the figures in it, and a comparison with it."""

import json
from pathlib import Path

import numpy as np
import pytest

from loadtests.answer import Objective
from loadtests.guidellm import read_guidellm
from loadtests.statistics import figures
from tests.command import refused, vllm_ext

FILE = Path(__file__).parent / "data" / "guidellm.json"
"""Of GuideLLM 0.8.1 with the token server, first tokens after 50 ms and the others 10 ms apart, at 4 and 8 a second."""


def test_its_times_and_tokens_are_ours():
    rows = json.loads(FILE.read_text())["benchmarks"]
    for row, benchmark in zip(rows, read_guidellm(FILE), strict=True):
        found = figures(benchmark.answers, Objective(), benchmark.start, benchmark.end, benchmark.rate)
        done = row["requests"]["successful"]
        assert found.rate == row["config"]["strategy"]["rate"]
        assert found.requests == found.rate * 5  # those cut off at the end were due after it
        assert len(benchmark.answers) == len(done) + len(row["requests"]["incomplete"])
        whole = [answer for answer in benchmark.answers if answer.error is None]
        assert sum(answer.answer_tokens for answer in whole) == sum(each["output_tokens"] for each in done)
        first = [1000 * (answer.times[0] - answer.sent) for answer in whole]
        assert first == pytest.approx([each["time_to_first_token_ms"] for each in done], abs=0.01)
        gaps = [1000 * float(np.mean(answer.gaps)) for answer in whole]
        assert gaps == pytest.approx([each["inter_token_latency_ms"] for each in done], rel=1e-3)


def test_two_files_are_compared_without_a_server(tmp_path):
    done = vllm_ext("loadtest", "compare", FILE, FILE, "--workload", "chat", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "chat: no difference: B serves " in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["runs"]) == 4
    assert report["workloads"]["chat"]["ratios"]["goodput_ratio"]["value"] == pytest.approx(1, abs=0.05)
    assert report["workloads"]["chat"]["ratios"]["ttft_p50_ratio"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "why"), [("{}", "no benchmarks.json"), ('{"metadata": {"version": 1}}', "version is 1, and 2 is read")]
)
def test_a_file_that_is_none_of_guidellms_is_refused(tmp_path, text, why):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert why in refused("loadtest", "compare", file, file, "--out", tmp_path / "out")
    assert "No such file" in refused("loadtest", "compare", "none.json", file, "--out", tmp_path / "out")
