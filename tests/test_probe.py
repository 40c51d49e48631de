"""A whole run on a tiny model with the real one's tokenizer: done, interrupted, gone on with, and shown."""

import json
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import write_tiny
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.errors import UsageError
from vllm_ext.offline.model import OfflineModel
from vllm_ext.probe import run
from vllm_ext.probe.attention import WINDOW, attention_stats
from vllm_ext.probe.run import ProbeSettings, probe

SETTINGS = ProbeSettings(("capitals", "prose", "summaries"), items=5, every=2)


@pytest.fixture(scope="module")
def tiny(smollm2, tmp_path_factory):
    """A tiny random model that reads what the embedded one reads."""
    folder = tmp_path_factory.mktemp("probe") / "tiny"
    write_tiny("Llama", folder, vocab_size=49_152)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """The folder of a finished run, through the command."""
    out = tmp_path_factory.mktemp("out") / "probe"
    options = ["--task", "capitals", "--task", "prose", "--task", "summaries", "--items", "5", "--every", "2"]
    command = ["probe", str(tiny), "--out", str(out), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vllm-ext", *command])
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "report.html")
    return out


def test_does_everything_once(done):
    lines = [json.loads(line) for line in (done / run.RESULTS).read_text().splitlines()]
    keys = [(row["name"], row["layer"], row["task"]) for row in lines[1:]]
    # Nothing changed; six manipulations of three tasks at three layers; what is looked at, and injection, at each.
    assert len(keys) == len(set(keys)) == 3 + 3 * (6 * 3 + 2)
    assert all(len(row["scores"]) == (5 if row["task"] == "capitals" else 1) for row in lines[1:] if "scores" in row)


def test_goes_on_where_it_was_interrupted(tiny, done, tmp_path):
    """Also where a line was half written."""
    lines = (done / run.RESULTS).read_text().splitlines(keepends=True)
    out = tmp_path / "again"
    out.mkdir()
    (out / run.RESULTS).write_text("".join(lines[:20]) + lines[20][:30])
    results = probe(Checkpoint.open(str(tiny), weights=True), out, SETTINGS)
    again = (out / run.RESULTS).read_text().splitlines(keepends=True)
    assert again[:20] == lines[:20]
    assert [json.loads(line)["layer"] for line in again[1:]] == [json.loads(line)["layer"] for line in lines[1:]]
    assert len(results.found) == len(lines) - 1
    for ours, theirs in zip(again[20:], lines[20:], strict=True):
        for name, value in json.loads(theirs).items():
            assert json.loads(ours)[name] == (pytest.approx(value, abs=1e-3) if name != "scores" else value)


def test_finished_runs_are_only_reported(tiny, done, monkeypatch):
    monkeypatch.setattr(run, "OfflineModel", None)
    assert len(probe(Checkpoint.open(str(tiny), weights=True), done, SETTINGS).found) == 63


def test_refuses_results_of_other_settings(tiny, done, tmp_path):
    source = Checkpoint.open(str(tiny), weights=True)
    with pytest.raises(UsageError, match="results of other settings"):
        probe(source, done, ProbeSettings(SETTINGS.tasks, items=6, every=2))
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="holds something else"):
        probe(source, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("chess",)}, "--task chess: there is none of that name; take capitals, sums"),
        ({"manipulations": ("swap",)}, "--manipulation swap: there is none of that name; take random, shuffle"),
        ({"items": 0}, "--items 0: choose 1 or more"),
        ({"every": 0}, "--every 0: choose 1 or more"),
        ({"tasks": ()}, "no task; give --task or --data"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        ProbeSettings(**settings)


def test_the_report_holds_its_pictures(done):
    page = (done / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(done.glob("*.png"))) >= 2
    assert "http" not in page.replace("https://arxiv.org", "")
    for text in ("skip attention", "countryinfo", "gensim", "--every 2", "torch"):
        assert text in page
    figures = [json.loads(line) for line in (done / run.RESULTS).read_text().splitlines()[1:]]
    unchanged = next(row["scores"] for row in figures if (row["name"], row["task"]) == ("none", "prose"))
    assert f"{sum(unchanged) / len(unchanged):.3f}" in page


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Olmo2"])
def test_what_an_attention_looks_at(tiny_models, family):
    """Against weights written out token by token, from transformers' own eager attention."""
    from transformers import AutoModelForCausalLM

    folder = tiny_models(family)
    model = OfflineModel(Checkpoint.open(str(folder), weights=True))
    tokens = torch.randint(3, 256, (2, WINDOW + 20), generator=torch.Generator().manual_seed(0))
    found = attention_stats(model, 3, [model.enter(tokens)])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    streams = []
    layer = plain.model.layers[3]
    after = {"Llama": "post_attention_layernorm", "Gemma2": "pre_feedforward_layernorm", "Olmo2": "mlp"}[family]
    layer.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    getattr(layer, after).register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    with torch.no_grad():
        weights = plain(tokens, use_cache=False, output_attentions=True).attentions[3]
    sinks, near = [], []
    for query in range(WINDOW, tokens.shape[1]):
        sinks.append(weights[:, :, query, 0].mean())
        near.append(weights[:, :, query, query - WINDOW + 1 : query + 1].sum(-1).mean())
    assert found.sink == pytest.approx(float(torch.stack(sinks).mean()), abs=1e-4)
    assert found.window == pytest.approx(float(torch.stack(near).mean()), abs=1e-4)
    similar = torch.nn.functional.cosine_similarity(*streams, dim=-1).mean()
    assert found.similarity == pytest.approx(float(similar), abs=1e-4)
