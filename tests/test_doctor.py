"""The doctor, run as a user runs it."""

import os
import subprocess
import sys

from model_executors.families import FAMILIES
from tests.command import vllm_ext


def test_finds_all_well_here():
    command = [sys.executable, "-m", "vllm_ext.cli.main", "doctor"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    for subject in ("vllm", "torch", "full, window, freeze, skip", *FAMILIES):
        assert subject in done.stdout


def test_says_what_to_mend(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    done = vllm_ext("doctor")
    assert done.returncode == 1
    assert "VLLM_PLUGINS: add vllm_ext to it or unset it" in done.stdout
