"""What is written: whole or not at all, in one line where it cannot be, and never tied to where it came from."""

import resource
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from model_executors.attention_plan import LayerPlan
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.folders import check_file, check_space, complete_folder, place
from vllm_ext.planned_checkpoint import write_planned

FROZEN = {5: LayerPlan("freeze")}


@pytest.fixture
def small_files():
    """Files may not be larger than 4 KiB, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_writing_to_one_never_changes_the_other(tiny_models, tmp_path):
    source = Checkpoint.open(str(tiny_models("Llama")), weights=True)
    names = sorted(path.name for path in source.folder.iterdir() if path.is_file())
    before = {name: (source.folder / name).read_bytes() for name in names}
    write_planned(source, source.planned(FROZEN), tmp_path / "out")
    for name in names:
        with (tmp_path / "out" / name).open("ab") as file:
            file.write(b"appended")
    assert {name: (source.folder / name).read_bytes() for name in names} == before


@pytest.mark.parametrize("mode", [0o640, 0o644, 0o444])
def test_who_may_read_the_source_may_read_the_copy(tmp_path, mode):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("weights")
    source.chmod(mode)
    place(source, target)
    assert target.read_text() == "weights"
    assert stat.S_IMODE(target.stat().st_mode) == mode | 0o200


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "text").write_bytes(b"x" * 8192),
        lambda folder: save_file({"x": torch.zeros(4096)}, folder / "x.safetensors"),
    ],
    ids=["text", "weights"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_files, write):
    told = "out: file too large; files may not be so large there"
    with pytest.raises(UsageError, match=told), complete_folder(tmp_path / "out") as building:
        write(building)
    assert list(tmp_path.iterdir()) == []


def test_space_is_asked_for_before(tiny_models, tmp_path, monkeypatch):
    source = Checkpoint.open(str(tiny_models("Llama")), weights=True)
    check_space(tmp_path / "out", source.files)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    monkeypatch.setattr("vllm_ext.folders._clones", lambda *_: False)
    with pytest.raises(UsageError, match=r"--out .*out: it takes \d+ MiB, and .* has 1 left; free some space"):
        check_space(tmp_path / "out", source.files)


def test_a_file_that_could_not_be_written(tmp_path):
    check_file("--json", tmp_path / "figures.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--json .*: no such folder; create"):
        check_file("--json", tmp_path / "file" / "figures.json")
    with pytest.raises(UsageError, match=r"--json .*: it is a folder; name a file in it"):
        check_file("--json", tmp_path)


def test_fetch_where_nothing_can_be_written(tmp_path):
    """Below a file, as a HOME that is none, the command says so in a line."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "model"
    command = [sys.executable, "-m", "vllm_ext.cli.main", "model", "fetch", "--to", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    told = f"error: {folder}: file exists; something else stands there; choose another"
    assert done.stderr.splitlines()[-1] == told
    assert "Traceback" not in done.stderr


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError), complete_folder(tmp_path / "out"):
        raise KeyError
