"""Fitted tensors, against the slow and obvious versions on a model whose lower planned layers are changed already."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from model_executors.attention_plan import AttentionPlan, LayerPlan, tensor_name
from tests.reference import Reference
from tests.tiny import CONFIGS, NUM_LAYERS, TEXT, VOCAB_SIZE, tokenizer
from tests.variants import write_quantized
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.errors import UsageError
from vllm_ext.offline import fit as fitting
from vllm_ext.offline.attentions import Seen
from vllm_ext.offline.fit import Fit, Moments, fit, fit_passages
from vllm_ext.offline.model import load
from vllm_ext.planned_checkpoint import write_planned

WINDOW = 8
# Gemma's odd layers are those without a sliding window of their own.
CHANGES = {
    1: LayerPlan("window", window=WINDOW),
    2: LayerPlan("skip", consolidation="linear"),
    3: LayerPlan("freeze", window=WINDOW),
    4: LayerPlan("skip", consolidation="linear", rank=16),
    5: LayerPlan("skip", consolidation="bias"),
}


def passages(number, length):
    return torch.randint(3, VOCAB_SIZE, (number, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are computed sooner on one, and far sooner where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tiny_models, tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    folder = shutil.copytree(tiny_models("Llama"), tmp_path_factory.mktemp("fit") / "llama")
    tokenizer().save_pretrained(folder)
    return folder


def fitted_and_seen(stock, planned):
    """The tensors that are fitted to `CHANGES`, and what the skipped layers of a reference with the same plan read, and
    the attention that was there makes of it: by layer, a list with an entry a passage.
    """
    source, text = Checkpoint.open(str(stock), weights=True), passages(8, 64)
    plan = source.planned(CHANGES)
    tensors, errors = fit_passages(load(stock), source.family, plan, text)
    write_planned(source, plan, planned, Fit(tensors, {}))
    seen = {layer: [] for layer in plan.skipped}
    # A frozen layer is fitted as text sees it that is not a prompt: as a window.
    reference = Reference(planned, CHANGES | {3: CHANGES[1]})
    whole = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32, attn_implementation="eager")

    def skip(layer):
        attention = getattr(whole.model.layers[layer], source.family.attention)

        def hook(module, args, kwargs):
            seen[layer].append((kwargs["hidden_states"][0], attention(**kwargs)[0][0]))

        return hook

    for layer in plan.skipped:
        module = getattr(reference.layers[layer], source.family.attention)
        module.register_forward_pre_hook(skip(layer), with_kwargs=True)
    with torch.no_grad():
        for passage in text:
            reference.model(passage[None], use_cache=False)
    return tensors, errors, seen


def ridge_by_lstsq(seen, layer):
    """The inputs' and the outputs' means, the inputs and what ordinary least squares makes of them: the ridge is rows
    of the data, one a feature.
    """
    x, y = (np.concatenate([np.float64(passage[part]) for passage in seen[layer]]) for part in (0, 1))
    x_mean, y_mean = x.mean(0), y.mean(0)
    ridge = np.sqrt(fitting.RIDGE * x.var(0).mean() * len(x)) * np.eye(x.shape[1])
    x = np.concatenate([x - x_mean, ridge])
    y = np.concatenate([y - y_mean, 0 * ridge])
    return x_mean, y_mean, x, np.linalg.lstsq(x, y)[0]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3"])
def test_each_layer_is_fitted_to_the_stream_that_its_planned_predecessors_left(tiny_models, tmp_path, family):
    tensors, errors, seen = fitted_and_seen(tiny_models(family), tmp_path / family)

    def made(layer, name):
        return np.float64(tensors[tensor_name(layer, name)])

    x_mean, y_mean, _, solution = ridge_by_lstsq(seen, 2)
    assert made(2, "weight") == pytest.approx(solution.T, abs=1e-3)
    assert made(2, "bias") == pytest.approx(y_mean - x_mean @ solution, abs=1e-3)

    x_mean, y_mean, x, solution = ridge_by_lstsq(seen, 4)
    directions = np.linalg.svd(x @ solution)[2][:16]
    assert made(4, "up") @ made(4, "down") == pytest.approx((solution @ directions.T @ directions).T, abs=1e-3)
    assert made(4, "bias") == pytest.approx(y_mean - x_mean @ solution @ directions.T @ directions, abs=1e-3)

    outputs = torch.cat([output for _, output in seen[5]])
    assert made(5, "bias") == pytest.approx(outputs.mean(0).numpy(), abs=1e-4)
    missed = (outputs - outputs.mean(0)).square().sum().sqrt() / outputs.square().sum().sqrt()
    assert errors[5] == pytest.approx(missed.item(), abs=1e-4)
    assert set(errors) == {2, 4, 5}


@pytest.mark.parametrize("family", CONFIGS)
def test_runs_layers_one_by_one_as_the_model_does(tiny_models, family):
    """What is fitted to the last layer, where nothing else is changed, is the mean of what the model makes there."""
    folder, text = tiny_models(family), passages(3, 40)
    source = Checkpoint.open(str(folder), weights=True)
    plan = source.planned({NUM_LAYERS - 1: LayerPlan("skip", consolidation="bias")})
    tensors, _ = fit_passages(load(folder), source.family, plan, text)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    attention = getattr(model.model.layers[-1], source.family.attention)
    attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(text, use_cache=False)
    expected = outputs[0].mean((0, 1))
    assert tensors[tensor_name(NUM_LAYERS - 1, "bias")].numpy() == pytest.approx(expected.numpy(), abs=1e-4)


def test_full_rank_is_the_full_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    y = x @ torch.randn(32, 32, generator=generator) + torch.randn(200, 32, generator=generator)

    def solved(rank):
        moments = Moments(LayerPlan("skip", consolidation="linear", rank=rank))
        for rows in (slice(0, 50), slice(50, 200)):
            with pytest.raises(Seen):
                moments(None, (x[None, rows],), {}, (y[None, rows], None))
        return moments.solve(torch.float32)

    full, low, all_of_it = solved(None), solved(4), solved(32)
    torch.testing.assert_close(all_of_it["up"] @ all_of_it["down"], full["weight"], atol=1e-5, rtol=0)
    torch.testing.assert_close(all_of_it["bias"], full["bias"], atol=1e-5, rtol=0)
    assert low["down"].shape == (4, 32)
    assert low["up"].shape == (32, 4)


def test_rounding_to_the_checkpoints_type_leaves_the_mean_exact():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator) + 10
    y = x @ torch.randn(32, 32, generator=generator)
    moments = Moments(LayerPlan("skip", consolidation="linear"))
    with pytest.raises(Seen):
        moments(None, (), {"hidden_states": x[None]}, (y[None], None))
    made = moments.solve(torch.bfloat16)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    mean = (x @ made["weight"].float().T + made["bias"].float()).mean(0)
    torch.testing.assert_close(mean, y.mean(0), rtol=2**-8, atol=1e-2)


def test_the_stream_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    room = fitting._on_disk(3, 4, 5)
    room[2] = 1.0
    assert room.sum() == 20
    assert list(tmp_path.iterdir()) == []


def test_says_what_was_fitted_on(llama):
    source = Checkpoint.open(str(llama), weights=True)
    plan = source.planned({4: CHANGES[1], 5: CHANGES[5]})
    made = fit(source, plan, [TEXT], tokens=330, length=32, seed=7, name="sums")
    assert made.tensors.keys() == source.fitted_shapes(plan).keys()
    assert made.provenance["text"]["name"] == "sums"
    assert made.provenance["text"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert {key: made.provenance[key] for key in ("tokens", "length", "seed")} == {
        "tokens": 320,
        "length": 32,
        "seed": 7,
    }
    assert made.provenance["versions"].keys() == {"vllm-ext", "torch", "transformers"}
    assert made.provenance["relative_errors"].keys() == {"5"}


@pytest.mark.parametrize(
    ("family", "layer", "plan", "message"),
    [
        ("Llama", 2, LayerPlan("skip", consolidation="linear", rank=128), "rank 128: a full map has 128"),
    ],
)
def test_refuses_a_plan_that_does_not_fit_the_model(tiny_models, family, layer, plan, message):
    source = Checkpoint.open(str(tiny_models(family)), weights=True)
    with pytest.raises(UsageError, match=message):
        fit(source, source.planned({layer: plan}), [TEXT], tokens=320, length=32, seed=0)


def quantized_and_plain(stock, folder, **changes):
    """The two checkpoints that `write_quantized` writes, the first as quantizing tools write it but for `changes`."""
    write_quantized(stock, folder / "quantized", folder / "plain")
    path = folder / "quantized" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"quantization_status": "compressed"} | changes
    path.write_text(json.dumps(config))
    return folder / "quantized", folder / "plain"


def test_quantized_weights_are_fitted_as_what_they_stand_for(tiny_models, tmp_path):
    made = []
    for folder in quantized_and_plain(tiny_models("Llama"), tmp_path):
        source = Checkpoint.open(str(folder), weights=True)
        made.append(fit_passages(load(folder), source.family, source.planned(CHANGES), passages(4, 64))[0])
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "cannot be fitted with gptq weights; plan what it was quantized from"),
        ({"quantization_status": "frozen"}, r"finds no weights for model\.layers\.0\.mlp\.down_proj\.weight"),
    ],
)
def test_refuses_weights_that_transformers_cannot_read(tiny_models, tmp_path, change, message):
    """It would make up those that it does not find."""
    quantized, _ = quantized_and_plain(tiny_models("Llama"), tmp_path, **change)
    with pytest.raises(UsageError, match=message):
        load(quantized)


def test_the_command_writes_a_checkpoint_of_every_kind(llama, tmp_path):
    (tmp_path / "sums.txt").write_text(TEXT)
    options = ["--window", "1:8", "--freeze", "2-3:8", "--skip", "4-5", "--consolidation", "linear", "--rank", "4"]
    fitting_options = ["--text", str(tmp_path / "sums.txt"), "--tokens", "320", "--length", "32"]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["plan", str(llama), *options, *fitting_options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    planned = Checkpoint.open(str(out), weights=True)
    planned.check_weights()
    freeze, skip = LayerPlan("freeze", window=8), LayerPlan("skip", consolidation="linear", rank=4)
    assert planned.plan == AttentionPlan.of(6, {1: CHANGES[1], 2: freeze, 3: freeze, 4: skip, 5: skip})
    assert json.loads((out / "config.json").read_text())["vllm_ext"]["fit"]["text"]["name"] == "sums.txt"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "plan needs --skip, --window or --freeze"),
        (["--skip", "5", "--consolidation", "bias", "--text", "nowhere"], "--text nowhere: cannot be read"),
        (["--skip", "5", "--consolidation", "bias", "--length", "513"], "--length 513: the model takes 512 tokens"),
        (["--skip", "5", "--out", "."], "--out .: it exists already"),
    ],
)
def test_the_command_refuses_before_it_fits(llama, tmp_path, options, message):
    result = CliRunner().invoke(app, ["plan", str(llama), "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_real_model_is_fitted_in_bounded_memory(smollm2, tmp_path):
    """In a process of its own, for its peak to be told."""
    options = [
        "plan",
        str(smollm2),
        "--skip",
        "3",
        "--consolidation",
        "linear",
        "--tokens",
        "4096",
        "--out",
        str(tmp_path / "out"),
    ]
    code = """
import resource, sys
from vllm_ext.cli.main import app
app(standalone_mode=False)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    command = [sys.executable, "-c", code, *options]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert int(done.stdout.split("peak")[1]) < 4 * 2**20  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Checkpoint.open(str(tmp_path / "out"), weights=True).check_weights()
