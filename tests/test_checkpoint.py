"""Checkpoints: opened, refused, and written with a plan."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model_executors.attention_plan import LayerPlan
from tests.tiny import NUM_LAYERS
from vllm_ext.checkpoint import INDEX, Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.folders import complete_folder
from vllm_ext.planned_checkpoint import FITTED, Fit, write_planned

SKIP = LayerPlan("skip")
CHANGES = {
    1: LayerPlan("window", window=16),
    2: LayerPlan("freeze", window=16),
    3: LayerPlan("freeze"),
    4: LayerPlan("skip", consolidation="linear", rank=8),
    5: LayerPlan("skip", consolidation="bias"),
}


def made_up_fit():
    """What `CHANGES` needs on the tiny Llama."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "4.down": (8, 128),
        "4.up": (128, 8),
        "4.bias": (128,),
        "5.bias": (128,),
    }
    tensors = {f"vllm_ext.layers.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Fit(tensors, {"text": {"name": "made up"}, "seed": 0})


@pytest.fixture
def llama(tiny_models, tmp_path):
    """A copy of the tiny Llama that a test may spoil."""
    return shutil.copytree(tiny_models("Llama"), tmp_path / "llama")


def opened(folder):
    return Checkpoint.open(str(folder), weights=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder):
    """Split the weights in two: the even layers and all the rest."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name in tensors:
        even = ".layers." in name and int(name.split(".")[2]) % 2 == 0
        weight_map[name] = "model-00001-of-00002.safetensors" if even else "model-00002-of-00002.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def written_tensors(folder):
    return {
        name: weights.get_tensor(name)
        for path in folder.glob("*.safetensors")
        for weights in [safe_open(path, framework="pt")]
        for name in weights.keys()  # noqa: SIM118 - not a dict
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_planned_checkpoint_leaves_out_the_skipped_attention_only(llama, tmp_path, sharded):
    stock = load_file(llama / "model.safetensors")
    if sharded:
        shard(llama)
    source = opened(llama)
    write_planned(source, source.planned({1: SKIP, 5: SKIP}), tmp_path / "out")

    gone = ("model.layers.1.self_attn.", "model.layers.5.self_attn.")
    kept = written_tensors(tmp_path / "out")
    assert set(kept) == {name for name in stock if not name.startswith(gone)}
    assert len(kept) == len(stock) - 2 * 4
    assert all(tensor.equal(stock[name]) for name, tensor in kept.items())
    if sharded:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert set(index["weight_map"]) == set(kept)
        untouched = "model-00001-of-00002.safetensors"
        assert (tmp_path / "out" / untouched).read_bytes() == (llama / untouched).read_bytes()


def test_a_planned_checkpoint_says_so_in_its_configuration(llama, tmp_path):
    source = opened(llama)
    plan = source.planned({4: SKIP, 5: SKIP})
    write_planned(source, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["AttentionPlanLlamaForCausalLM"]
    assert config["vllm_ext"]["tensors_left_out"] == 8
    assert "fit" not in config["vllm_ext"]
    assert opened(tmp_path / "out").plan == plan
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_planned_checkpoint_holds_what_was_fitted_and_on_what(llama, tmp_path, sharded):
    stock = load_file(llama / "model.safetensors")
    if sharded:
        shard(llama)
    source, fit = opened(llama), made_up_fit()
    plan = source.planned(CHANGES)
    write_planned(source, plan, tmp_path / "out", fit)

    gone = ("model.layers.4.self_attn.", "model.layers.5.self_attn.")
    kept = written_tensors(tmp_path / "out")
    assert set(kept) == {name for name in stock if not name.startswith(gone)} | set(fit.tensors)
    assert all(kept[name].equal(tensor) for name, tensor in fit.tensors.items())
    assert set(load_file(tmp_path / "out" / FITTED)) == set(fit.tensors)
    if sharded:
        assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]) == set(kept)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["vllm_ext"]
    assert section["fit"] == fit.provenance
    assert section["tensors_left_out"] == 8
    written = opened(tmp_path / "out")
    written.check_weights()
    assert written.plan == plan


def test_refuses_a_planned_checkpoint_without_its_fitted_tensors(llama, tmp_path):
    source = opened(llama)
    write_planned(source, source.planned(CHANGES), tmp_path / "out", made_up_fit())
    (tmp_path / "out" / FITTED).unlink()
    with pytest.raises(UsageError, match=r"no tensor vllm_ext\.layers\.4\.down, which its plan needs; write it"):
        opened(tmp_path / "out").check_weights()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("4.up", (128, 16), r"4\.up is \[128, 16\], but the plan needs \[128, 8\]"),
        ("5.bias", (1, 128), r"5\.bias is \[1, 128\], but the plan needs \[128\]"),
    ],
)
def test_refuses_fitted_tensors_of_another_shape(llama, tmp_path, name, shape, message):
    fit = made_up_fit()
    fit.tensors[f"vllm_ext.layers.{name}"] = torch.zeros(shape)
    source = opened(llama)
    write_planned(source, source.planned(CHANGES), tmp_path / "out", fit)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "out").check_weights()


def test_what_must_be_fitted_cannot_be_laid_over_a_stock_checkpoint(llama):
    source = opened(llama)
    windowed = source.planned({1: CHANGES[1], 4: CHANGES[2], 5: SKIP})
    assert source.overrides(windowed)["architectures"] == ["AttentionPlanLlamaForCausalLM"]
    with pytest.raises(UsageError, match="layer 4 needs tensors fitted on text; write a checkpoint with vllm-ext plan"):
        source.overrides(source.planned(CHANGES))


def test_refuses_a_plan_whose_sinks_were_fitted(llama):
    """By an older version, which wrote none of the windows' first tokens down."""
    entries = ["full"] * 5 + [{"kind": "window", "window": 16}]
    change_config(llama, architectures=["AttentionPlanLlamaForCausalLM"], vllm_ext={"attention_plan": entries})
    with pytest.raises(UsageError, match=r"\[5\].* has a window without a sink, .*; write the checkpoint anew from"):
        opened(llama).plan  # noqa: B018


def test_refuses_a_window_where_the_model_has_one(tiny_models, tmp_path):
    source = opened(tiny_models("Gemma3"))
    with pytest.raises(UsageError, match="window 16 on layer 2: the model gives that layer a sliding window of 16 alr"):
        write_planned(source, source.planned({2: CHANGES[1]}), tmp_path / "out")


def test_a_stock_checkpoint_has_no_plan(llama):
    assert opened(llama).plan is None


def test_nothing_is_left_behind_by_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_folder(tmp_path / "out") as building:
        (building / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_folder_that_exists(llama, tmp_path):
    (tmp_path / "out").mkdir()
    source = opened(llama)
    with pytest.raises(UsageError, match="exists already; choose another folder"):
        write_planned(source, source.planned({5: SKIP}), tmp_path / "out")


def test_refuses_a_folder_that_cannot_be_made(llama, tmp_path):
    (tmp_path / "file").write_text("")
    source = opened(llama)
    with pytest.raises(UsageError, match=r"no folder can be made in .*file; choose another"):
        write_planned(source, source.planned({5: SKIP}), tmp_path / "file" / "out")


def test_refuses_to_plan_a_planned_checkpoint(llama, tmp_path):
    source = opened(llama)
    write_planned(source, source.planned({5: SKIP}), tmp_path / "out")
    with pytest.raises(UsageError, match="has an attention plan already"):
        opened(tmp_path / "out").planned({4: SKIP})


@pytest.mark.parametrize(
    ("skip", "message"),
    [([NUM_LAYERS], "layer 6 does not exist; the model has layers 0-5"), (range(NUM_LAYERS), "skips all 6 layers")],
)
def test_refuses_layers_that_cannot_be_skipped(llama, skip, message):
    with pytest.raises(UsageError, match=message):
        opened(llama).planned(dict.fromkeys(skip, SKIP))


def test_refuses_a_model_that_is_nowhere(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(UsageError, match="neither a folder nor to be had from a model hub"):
        opened("nobody/nothing")


def test_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json in that folder"):
        opened(tmp_path)


def test_refuses_a_configuration_that_is_no_json(llama):
    (llama / "config.json").write_text('{"architectures": [')
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        opened(llama)


def test_refuses_a_family_without_a_row(llama):
    change_config(llama, architectures=["BertModel"])
    with pytest.raises(UsageError, match="BertModel has no attention plan; use one of"):
        opened(llama).planned({1: SKIP})


@pytest.mark.parametrize("plan", [CHANGES[1], CHANGES[2]], ids=["window", "freeze"])
def test_refuses_a_kind_that_the_family_cannot_be(llama, plan):
    change_config(llama, architectures=["Llama4ForCausalLM"])
    with pytest.raises(UsageError, match=f"layer 1 cannot be {plan.kind} in Llama4ForCausalLM; use one of full, sk"):
        opened(llama).planned({1: plan})


def test_refuses_a_plan_for_another_depth(llama):
    change_config(
        llama,
        architectures=["AttentionPlanLlamaForCausalLM"],
        vllm_ext={"attention_plan": ["full"] * 4},
    )
    with pytest.raises(UsageError, match="for 4 layers but the model has 6"):
        opened(llama).plan  # noqa: B018


def test_refuses_a_plan_under_a_stock_architecture(llama):
    """Stock vLLM would serve it as if there were no plan."""
    change_config(llama, vllm_ext={"attention_plan": ["full"] * 6})
    with pytest.raises(UsageError, match="set it to AttentionPlanLlamaForCausalLM"):
        opened(llama).plan  # noqa: B018


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_refuses_truncated_weights(llama, size):
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged"):
        opened(llama).check_weights()


def test_refuses_missing_weights(llama):
    shard(llama)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model-00002-of-00002\.safetensors is missing"):
        opened(llama).check_weights()
    for path in [*llama.glob("*.safetensors"), llama / INDEX]:
        path.unlink()
    with pytest.raises(UsageError, match=r"no \*\.safetensors weights"):
        opened(llama).check_weights()


def test_a_gguf_file_says_how_to_convert_it(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for model in (file, tmp_path):
        with pytest.raises(
            UsageError, match=r"GGUF file; make a checkpoint of it: vllm-ext model convert .*model.gguf"
        ):
            opened(model)


def test_a_checkpoint_without_a_tokenizer_says_so(llama, tmp_path, capsys):
    source = opened(llama)
    write_planned(source, source.planned({5: SKIP}), tmp_path / "out")
    assert "has no tokenizer, and so has" in capsys.readouterr().err
    (llama / "tokenizer.json").write_text("{}")
    write_planned(source, source.planned({5: SKIP}), tmp_path / "other")
    assert "has no tokenizer" not in capsys.readouterr().err
