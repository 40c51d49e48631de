"""Self-distillation on a tiny model: it learns, it goes on after an interruption, and what it writes is served."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from model_executors.attention_plan import LayerPlan
from tests.answers import assert_same
from tests.character_heads import CharacterReference
from tests.engines import answers, engine
from tests.test_vocabulary import byte_level
from tests.tiny import prompts, write_tiny
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.errors import UsageError
from vllm_ext.heads import training

SIZES = ["--length", "32", "--tokens", "512", "--held-out", "64", "--width", "64", "--batch", "64"]


VOCAB_SIZE = 400


def rows():
    """Twenty texts; the first two are held out."""
    chosen = random.Random(0)
    return [" ".join(chosen.choice(["the", "cat", "dog", "sat", "on", "mat"]) for _ in range(160)) for _ in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a tokenizer of tokens of several bytes."""
    folder = tmp_path_factory.mktemp("conversion") / "llama"
    write_tiny("Llama", folder, vocab_size=VOCAB_SIZE)
    made, trainer = byte_level()
    trainer.vocab_size = VOCAB_SIZE
    made.train_from_iterator(rows(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows()))
    return file


def run(model, text, out, *options):
    command = ["heads", "train", str(model), "--out", str(out), "--text", str(text), *SIZES, *options]
    return CliRunner().invoke(app, command)


def trained(model, text, out, *options):
    result = run(model, text, out, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.splitlines()[-1] == str(out)
    return Checkpoint.open(str(out), weights=True)


@pytest.fixture(scope="module")
def converted(model, text, tmp_path_factory):
    """Trained for long on a small text."""
    out = tmp_path_factory.mktemp("converted") / "spelled"
    return trained(model, text, out, "--steps", "400", "--learning-rate", "0.01")


def agreement(checkpoint, work):
    """With the teacher's top token, on what it was trained on, computed anew."""
    reference = CharacterReference(checkpoint.folder, {})
    passages = load_file(work / "passages.safetensors")["passages"]
    same = []
    for passage in passages.tolist():
        states = reference.model.model(torch.tensor([passage]), use_cache=False).last_hidden_state[0]
        spelled = reference.logprobs(passage).argmax(-1)
        same.append((spelled == reference.model.lm_head(states).argmax(-1)).float().mean().item())
    return sum(same) / len(same)


def test_overfits_a_small_text(converted):
    assert agreement(converted, converted.folder.with_name("spelled-training")) >= 0.99


def test_what_it_writes_is_served(converted):
    converted.check_weights()
    reference = CharacterReference(converted.folder, {})
    expected = [reference.answer(prompt, 4) for prompt in prompts((2, 17))]
    with engine(converted.folder) as llm:
        assert_same(answers(llm, prompts((2, 17)), 4), expected)


def test_says_how_it_was_made(converted):
    provenance = converted.config["vllm_ext"]["training"]
    assert provenance["tokens"] == 512
    assert provenance["judged"]["rescored"]["tokens"] == 64
    assert [row["agreement"] for row in provenance["calibration"]][-1] == 1.0
    for row in provenance["calibration"]:
        assert row["reached"] >= row["agreement"]
    page = (converted.folder / "training" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    work = converted.folder.with_name("spelled-training")
    curve = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [*range(0, 400, training.LOGGED_EVERY), 399]
    assert curve[-1]["loss"] < curve[0]["loss"] / 10
    assert list(work.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--layers", "2", "--noise", "0"],
        ["--layers", "2", "--lora", "4"],
        ["--accumulation", "2", "--noise", "0.1"],
    ],
)
def test_a_run_that_was_stopped_comes_to_the_same(model, text, tmp_path, monkeypatch, options):
    steps = ["--steps", "6", "--save-every", "2", *options]
    whole = trained(model, text, tmp_path / "whole", *steps)
    original, calls = training.loss_of, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "loss_of", stopping)
    assert run(model, text, tmp_path / "stopped", *steps).exit_code != 0
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setattr(training, "loss_of", original)
    resumed = trained(model, text, tmp_path / "stopped", *steps)
    for file in ("vllm_ext.safetensors", "model.safetensors"):
        ours, theirs = load_file(whole.folder / file), load_file(resumed.folder / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_trains_the_upper_layers_and_nothing_else(model, text, tmp_path):
    made = trained(model, text, tmp_path / "out", "--steps", "2", "--layers", "2")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, made.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.{layer}.mlp.{part}.weight" for layer in (4, 5) for part in parts}


def test_adapters_are_merged_into_the_weights(model, text, tmp_path):
    """What is written differs from the model by matrices of the adapters' rank."""
    made = trained(model, text, tmp_path / "out", "--steps", "20", "--layers", "1", "--lora", "3")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, made.folder))
    assert before.keys() == after.keys()
    changed = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    assert changed.keys() == {f"model.layers.5.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    for name, change in changed.items():
        values = torch.linalg.svdvals(change.double())
        assert values[2] > 0, name
        assert values[3] < 1e-3 * values[0], name


def test_heals_a_skipping_plan_with_the_stock_head(model, text, tmp_path):
    """The divergence from the unchanged model falls, and what is written is the plan with other MLPs."""
    source = Checkpoint.open(str(model), weights=True)
    plan = CliRunner().invoke(app, ["plan", str(model), "--skip", "3-5", "--out", str(tmp_path / "plan")])
    assert plan.exit_code == 0
    options = ["--planned", str(tmp_path / "plan"), "--head", "stock", "--layers", "3", "--learning-rate", "0.005"]
    begun = trained(model, text, tmp_path / "begun", *options, "--steps", "1")
    healed = trained(model, text, tmp_path / "healed", *options, "--steps", "300")
    assert healed.plan == source.planned(dict.fromkeys((3, 4, 5), LayerPlan("skip")))
    assert healed.head.kind == "stock"
    before, after = (each.config["vllm_ext"]["training"]["judged"]["stock"]["divergence"] for each in (begun, healed))
    assert after < before
    curve = (tmp_path / "healed-training" / "curve.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["loss"] for line in (curve[0], curve[-1]))
    assert last < first / 5
    healed.check_weights()


def test_two_processes_take_half_of_each_batch(model, text, tmp_path):
    """They come to what one does, but for the order in which sums are taken."""
    options = ["--text", str(text), *SIZES, "--steps", "3"]
    alone = trained(model, text, tmp_path / "alone", "--steps", "3")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    command = [*launch, "vllm_ext.cli.main", "heads", "train", str(model), "--out", str(tmp_path / "two"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count(str(tmp_path / "two")) == 1
    ours, theirs = (load_file(folder / "vllm_ext.safetensors") for folder in (alone.folder, tmp_path / "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=1e-3)


def test_the_places_cross_entropy_is_another_loss(model, text, tmp_path):
    made = trained(model, text, tmp_path / "out", "--steps", "60", "--loss", "places", "--learning-rate", "0.01")
    lines = (tmp_path / "out-training" / "curve.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["loss"] for line in (lines[0], lines[-1]))
    assert last < first
    assert made.head.kind == "rescored"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "stock"], "--head stock without --layers: nothing would be trained"),
        (["--lora", "4"], "--lora 4 without --layers"),
        (["--steps", "0"], "--steps 0: choose 1 or more"),
        (["--learning-rate", "0"], "--learning-rate 0: choose a positive number"),
        (["--batch", "100000"], "--batch 100000: the text makes 512 tokens"),
        (["--tokens", "100000"], "the text has"),
    ],
)
def test_refuses(model, text, tmp_path, options, message):
    result = run(model, text, tmp_path / "out", *options)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_does_not_mix_two_runs(model, text, tmp_path):
    trained(model, text, tmp_path / "out", "--steps", "2")
    shutil.rmtree(tmp_path / "out")
    result = run(model, text, tmp_path / "out", "--steps", "3")
    assert isinstance(result.exception, UsageError)
    assert "a run with other settings was begun there" in str(result.exception)


def test_thresholds_for_other_text(converted, model, text, tmp_path):
    """They are found anew and kept in the checkpoint; its weights stay, and a model without heads is refused."""
    folder = tmp_path / "spelled"
    shutil.copytree(converted.folder, folder)
    command = ["heads", "calibrate", str(folder), "--text", str(text), "--tokens", "128", "--length", "32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "--head rescored" in result.stdout
    made = Checkpoint.open(str(folder), weights=True)
    made.check_weights()
    before, after = (each.config["vllm_ext"] for each in (converted, made))
    assert after["training"]["calibrated_on"] == {"text": "text.jsonl", "tokens": 128, "written": 0}
    assert {kind: each["tokens"] for kind, each in after["training"]["judged"].items()} == {
        "character": 128,
        "rescored": 128,
    }
    kinds = [(row["head"], row["agreement"]) for row in after["training"]["calibration"]]
    assert kinds == [(row["head"], row["agreement"]) for row in before["training"]["calibration"]]
    assert {name: after[name] for name in after if name != "training"} == {
        name: before[name] for name in before if name != "training"
    }
    refused = CliRunner().invoke(app, ["heads", "calibrate", str(model)])
    assert isinstance(refused.exception, UsageError)
    assert "it has no character heads" in str(refused.exception)
