"""The doctor, run as a user runs it."""

import os
import subprocess
import sys

import pytest
import torch

from model_executors.families import FAMILIES
from tests.command import vllm_ext
from vllm_ext import doctor


def test_finds_all_well_here_in_seconds():
    command = [sys.executable, "-m", "vllm_ext.cli.main", "doctor"]
    environment = {**os.environ, "COLUMNS": "80"}
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    after = os.times()
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    for told in ("vllm", "torch", f"{len(FAMILIES)}, rows of", "full, window, freeze, skip", "cores; bfloat16 is"):
        assert told in done.stdout
    assert len(done.stdout.splitlines()) <= 8
    # Of the processor's time, since others may be at work beside.
    assert after.children_user - before.children_user + after.children_system - before.children_system < 5


@pytest.mark.parametrize(("slow", "told"), [(True, "serve with --dtype float32"), (False, "keep the checkpoint's")])
def test_the_type_follows_from_the_cpu(monkeypatch, slow, told):
    monkeypatch.setattr("vllm_ext.dtypes.slow_on_cpu", lambda dtype: slow)
    assert doctor._cpu().state.startswith(torch.backends.cpu.get_cpu_capability())
    assert doctor._cpu().state.endswith(told)


def test_says_what_to_mend(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    done = vllm_ext("doctor")
    assert done.returncode == 1
    assert "no  VLLM_PLUGINS" in done.stdout
    assert "VLLM_PLUGINS: add vllm_ext to it or unset it" in done.stdout


def test_finds_a_package_built_for_another_torch(monkeypatch):
    def broken(package):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "import_module", broken)
    monkeypatch.setattr(doctor, "version", lambda package: "0.28.0")
    finding = doctor._torch("2.13.0+cpu")
    assert finding.cure.startswith("torchvision does not import beside it (operator torchvision::nms does not exist)")
