"""The doctor, run as a user runs it."""

import os
import subprocess
import sys

from model_executors.families import FAMILIES


def examine(**environment):
    return subprocess.run(
        [sys.executable, "-m", "vllm_ext.cli.main", "doctor"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment, "COLUMNS": "200"},
    )  # fmt: skip


def test_finds_all_well_here():
    done = examine()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    for subject in ("vllm", "torch", "full, window, freeze, skip", *FAMILIES):
        assert subject in done.stdout


def test_says_what_to_mend():
    done = examine(VLLM_PLUGINS="another")
    assert done.returncode == 1
    assert "VLLM_PLUGINS: add vllm_ext to it or unset it" in done.stdout
