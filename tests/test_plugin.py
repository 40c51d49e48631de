"""What vLLM sees of the extension."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm import ModelRegistry

from model_executors.families import FAMILIES
from model_executors.layers.decoder import AttentionPlanDecoder
from tests.command import vllm_ext
from vllm_ext import plugin, versions

WRONG = "vllm is 0.31.1, and this release works with 0.32.0; install vllm==0.32.0"


def test_registers_every_family_once_however_often_it_is_called():
    plugin.register()
    plugin.register()
    assert {family.planned_architecture for family in FAMILIES.values()} <= set(ModelRegistry.get_supported_archs())


def test_each_planned_class_is_vllms_own_with_the_adapter_in_front():
    import model_executors.layers.decoder as decoder

    for family in FAMILIES.values():
        planned = getattr(decoder, family.planned_architecture)
        stock = ModelRegistry.models[family.architecture].load_model_cls()
        assert planned.__bases__ == (AttentionPlanDecoder, stock)
        assert planned is getattr(decoder, family.planned_architecture)


def test_every_entry_point_has_the_one_name_and_loads():
    for group in ("vllm.general_plugins", "vllm.stat_logger_plugins"):
        (point,) = entry_points(group=group, name="vllm_ext")
        assert callable(point.load())


def test_the_plugin_module_does_not_import_torch():
    """Every vLLM process loads it, before torch is ready."""
    code = "import vllm_ext.plugin, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("found", "works"),
    [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.1", False), ("0.33.0", False), ("1.32.0", False)],
)
def test_works_with_the_minor_version_it_was_tested_with(monkeypatch, found, works):
    monkeypatch.setattr(versions, "version", lambda _name: found)
    problem = versions.vllm_problem()
    assert problem == (None if works else f"vllm is {found}, and this release works with 0.32.0; install vllm==0.32.0")


def test_registers_nothing_where_it_cannot_work(monkeypatch):
    """Then vLLM refuses a planned checkpoint by its architecture, and still serves stock ones."""
    registered = []
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *names: registered.append(names))
    monkeypatch.setattr(versions, "vllm_distribution", lambda: ("vllm", "0.31.1"))
    told = []
    monkeypatch.setattr(plugin.logger, "error", lambda line, problem: told.append(line % problem))
    plugin.register()
    assert registered == []
    assert told == [f"vllm-ext registers nothing: {WRONG}"]


@pytest.mark.parametrize("command", [["plan"], ["serve"]], ids=min)
def test_commands_say_in_one_line_which_version_to_install(tiny_models, tmp_path, monkeypatch, command):
    """A plan is written all the same, for a machine where it can be served."""
    monkeypatch.setattr(versions, "vllm_distribution", lambda: ("vllm", "0.31.1"))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    options = ["--skip", "5", *(["--out", tmp_path / "out"] if command == ["plan"] else [])]
    done = vllm_ext(*command, tiny_models("Llama"), *options)
    if command == ["serve"]:
        assert (done.returncode, done.stderr) == (2, f"error: {WRONG}\n")
    else:
        assert (done.returncode, done.stderr.splitlines()[0]) == (
            0,
            f"warning: the plan cannot be served here: {WRONG}",
        )
        assert (tmp_path / "out" / "config.json").exists()


def test_says_so_where_there_is_no_vllm(monkeypatch):
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("surely-not-installed",))
    assert versions.vllm_problem().startswith("vLLM is not installed; install vllm-ext[cpu]")
