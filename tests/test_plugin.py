"""What vLLM sees of the extension."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm import ModelRegistry

from model_executors.families import FAMILIES
from model_executors.layers.decoder import AttentionPlanDecoder
from vllm_ext import plugin, versions


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
    monkeypatch.setattr(versions, "version", lambda _name: "0.31.1")
    plugin.register()
    assert registered == []


def test_says_so_where_there_is_no_vllm(monkeypatch):
    monkeypatch.setattr(versions, "DISTRIBUTIONS", ("surely-not-installed",))
    assert versions.vllm_problem().startswith("vLLM is not installed; install vllm-ext[cpu]")
