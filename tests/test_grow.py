"""How cost grows: the pictures it draws, and what it refuses."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from model_executors.attention_plan import LayerPlan
from tests.fitted import write_random
from vllm_ext.bench.grow import main
from vllm_ext.errors import run_tool

EAGER = ("--enforce-eager", "--dtype", "float32")


def grow(*arguments):
    command = [sys.executable, "-m", "vllm_ext.bench.grow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def drawn(done, out):
    """The figures it printed, of which the picture says how it was made."""
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert picture.text["Description"].startswith("python -m vllm_ext.bench.grow ")
    assert out.stat().st_size < 200_000
    path, figures = done.stdout.splitlines()[-2:]
    assert path == str(out)
    return json.loads(figures)


def test_streams(tiny_models, tmp_path):
    """One engine each of stock and the plan, asked with one stream and with two."""
    llama, out = tiny_models("Llama"), tmp_path / "streams.png"
    planned = write_random(llama, tmp_path / "planned", {5: LayerPlan("window", window=16)})
    points = ("--point", 1, "--point", 2)
    found = drawn(grow("streams", "--model", llama, "--planned", planned, "--out", out, *points, *EAGER), out)
    assert found["points"] == [1, 2]
    for lines in (found["measured"], found["ideal"]):
        assert list(lines) == ["stock", "planned"]
        assert all(len(line) == 2 and min(line) > 0 for line in lines.values())
    # Two streams move the same weights and more of the KV cache, of which a window is less.
    assert found["ideal"]["stock"][0] < found["ideal"]["stock"][1]
    assert found["ideal"]["planned"][1] < found["ideal"]["stock"][1]


@pytest.mark.slow
def test_skipped_layers(smollm2, tmp_path):
    """An engine a point, with so many of the top layers skipped."""
    out = tmp_path / "skipped.png"
    points = ("--point", 0, "--point", 10)
    found = drawn(grow("skipped", "--model", smollm2, "--out", out, *points, "--enforce-eager"), out)
    for lines in (found["measured"], found["ideal"]):
        assert list(lines) == ["prefill:1024", "decode:1x128"]
        assert all(len(line) == 2 and min(line) > 0 for line in lines.values())
    assert all(line[1] < line[0] for line in found["ideal"].values())


def test_vocabulary(tmp_path):
    """The heads by themselves, without an engine."""
    out = tmp_path / "vocabulary.png"
    found = drawn(grow("vocabulary", "--out", out, "--point", 512, "--point", 1024), out)
    assert {"stock", "character", "screened"} <= set(found["measured"])
    assert found["ideal"]["stock"][1] == pytest.approx(2 * found["ideal"]["stock"][0])


def test_refuses_what_cannot_be_drawn(tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the commands run in this process
    llama, out = tiny_models("Llama"), tmp_path / "picture.png"
    for arguments, told in (
        (("streams", "--model", llama, "--out", out), "--planned is missing"),
        (("streams", "--out", tmp_path / "picture.jpg"), "give a .png in a folder that exists"),
        (("skipped", "--model", llama, "--out", out, "--point", 5), "--work prefill:1024: its requests grow to 1025"),
        (("skipped", "--model", llama, "--out", out, "--point", 6), "the model has 6 layers and one must attend"),
        (("context", "--model", llama, "--planned", llama, "--out", out, "--point", 0), "--point 0: context cannot be"),
    ):
        monkeypatch.setattr("sys.argv", ["grow", *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            run_tool(main, allow_extra_args=True, ignore_unknown_options=True)
        assert told in capsys.readouterr().err
        assert not out.exists()
