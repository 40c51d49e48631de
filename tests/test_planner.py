"""The command on tiny models whose idle layers are planted, on text of the models' own."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import NUM_LAYERS, tokenizer
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.errors import UsageError
from vllm_ext.offline.model import Changed, OfflineModel, generate
from vllm_ext.planner.judge import Goal
from vllm_ext.planner.run import Planner, Settings

FIT = ["--tokens", "640", "--length", "64"]


@pytest.fixture(scope="module")
def planted(tiny_models, tmp_path_factory):
    """A Llama that writes ASCII, and whose layers 3-5 attend to no effect."""
    folder = tmp_path_factory.mktemp("planner") / "model"
    model = OfflineModel(Checkpoint.open(str(tiny_models("Llama")), weights=True)).model
    model.lm_head.weight.data[:32] = model.lm_head.weight.data[127:] = 0
    for layer in model.model.layers[3:]:
        layer.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(planted, tmp_path_factory):
    """Prompts, and what the model answers."""
    file = tmp_path_factory.mktemp("data") / "own.jsonl"
    model = OfflineModel(Checkpoint.open(str(planted), weights=True))
    asked = torch.randint(32, 127, (90, 200), generator=torch.Generator().manual_seed(0))
    own = generate(Changed(model), asked, 4)
    rows = [
        {"prompt": "".join(map(chr, prompt)), "answer": "".join(map(chr, answer))}
        for prompt, answer in zip(asked.tolist(), own.tolist(), strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(planted, *options):
    return CliRunner().invoke(app, ["plan", str(planted), "--auto", "--size", "8", "--context", "512", *FIT, *options])


@pytest.fixture(scope="module")
def found(planted, data, tmp_path_factory):
    """What a search leaves: the checkpoint's folder."""
    out = tmp_path_factory.mktemp("out") / "planned"
    options = ["--data", str(data), "--max-loss", "0.02", "--passes", "60", "--out", str(out)]
    result = run(planted, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    return out


def test_layers_that_do_nothing_let_go(found):
    plan = Checkpoint.open(str(found), weights=True).plan
    assert plan is not None
    assert all(layer.kind != "full" for layer in plan.layers[3:])
    Checkpoint.open(str(found), weights=True).check_weights()


def test_the_report_says_what_was_found(found):
    report = json.loads((found / "report" / "front.json").read_text())
    (taken,) = [each for each in report["plans"] if each["taken"]]
    (written,) = [each for each in report["plans"] if each["written"]]
    assert taken["options"] == written["options"]
    assert taken["kept"] >= 0.98
    assert taken["kv_saved"] == max(each["kv_saved"] for each in report["plans"] if each["kept"] >= 0.98)
    assert report["passes"] <= 60
    assert report["header"]["searched"] == {"own": 30}
    assert report["header"]["tasks"]["own"]["items"] == 60
    page = (found / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((found / "report").glob("*.png"))) == 2
    assert taken["options"] in page
    assert "as written" in page


def test_the_options_of_a_plan_say_the_same(planted, found, tmp_path):
    report = json.loads((found / "report" / "front.json").read_text())
    (taken,) = [each for each in report["plans"] if each["taken"]]
    again = CliRunner().invoke(
        app, ["plan", str(planted), *taken["options"].split(), *FIT, "--out", str(tmp_path / "again")]
    )
    assert again.exit_code == 0, again.output
    assert Checkpoint.open(str(tmp_path / "again"), weights=True).plan == Checkpoint.open(str(found), weights=True).plan


def test_chooses_again_from_what_was_found(planted, data, found, tmp_path):
    front = found / "report" / "front.json"
    before = json.loads(front.read_text())
    plans = [each for each in before["plans"] if not each["written"]]
    least = min(each["kv_saved"] for each in plans)
    options = ["--auto", "--front", str(front), "--kv-saving", str(least), *FIT, "--out", str(tmp_path / "again")]
    result = CliRunner().invoke(app, ["plan", str(planted), *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "again" / "report" / "front.json").read_text())
    assert report["header"]["settings"]["goal"] == {"max_loss": None, "kv_saving": least}
    assert report["passes"] == before["passes"]
    assert [each["options"] for each in report["plans"] if not each["written"]] == [each["options"] for each in plans]
    (written,) = [each for each in report["plans"] if each["written"]]
    assert written["kv_saved"] >= least
    assert Checkpoint.open(str(tmp_path / "again"), weights=True).plan is not None


def test_a_plan_of_ones_own_is_judged_beside_what_was_found(planted, found, tmp_path):
    """What the others save is counted anew: an earlier version may have counted otherwise."""
    earlier = json.loads((found / "report" / "front.json").read_text())
    saved = {each["options"]: each["kv_saved"] for each in earlier["plans"]}
    for each in earlier["plans"]:
        each["kv_saved"] = 0.999
    (tmp_path / "front.json").write_text(json.dumps(earlier))
    options = ["--auto", "--front", str(tmp_path / "front.json"), "--window", "0-5:8", "--kv-saving", "0.9", *FIT]
    result = CliRunner().invoke(app, ["plan", str(planted), *options, "--out", str(tmp_path / "own")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "own" / "report" / "front.json").read_text())
    counted = {each["options"]: each["kv_saved"] for each in report["plans"]}
    assert counted == saved | {"--window 0-5:8": pytest.approx(1 - 6 * 2 / (6 * 32))}
    (taken,) = [each for each in report["plans"] if each["taken"]]
    (written,) = [each for each in report["plans"] if each["written"]]
    assert taken["options"] == written["options"] == "--window 0-5:8"
    assert taken["kept"] == written["kept"] < 0.98


def test_refuses_a_front_of_another_model(tiny_models, found, tmp_path):
    front = str(found / "report" / "front.json")
    options = ["--auto", "--front", front, "--max-loss", "0.02", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["plan", str(tiny_models("Qwen2")), *options])
    assert isinstance(result.exception, UsageError)
    assert "--front: it is of model of 6 layers" in str(result.exception)


def test_a_guess_gives_windows_to_what_looks_near(planted, data, tmp_path):
    options = ["--data", str(data), "--kv-saving", "0.4", "--quick", "--out", str(tmp_path / "quick")]
    result = run(planted, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "quick" / "report" / "front.json").read_text())
    (written,) = report["plans"]
    assert written["written"]
    # A window of 8 takes up to 2 of a layer's 32 blocks: three of six layers are enough.
    assert written["kv_saved"] == pytest.approx(1 - 3 * (32 + 2) / (6 * 32))


def test_searches_and_judges_on_other_items(planted, data):
    planner = Planner(Checkpoint.open(str(planted), weights=True), Settings(Goal(0.02), (), (str(data),)))
    (searched,), (judged,) = planner.searched, planner.judged
    assert len(searched.items) == NUM_LAYERS * 5
    assert not set(searched.items) & set(judged.items)


def test_nothing_that_was_found_is_lost_where_no_plan_is_good_enough(planted, data, tmp_path):
    result = run(planted, "--data", str(data), "--kv-saving", "0.99", "--passes", "40", "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, UsageError)
    report = tmp_path / "out-report" / "report.html"
    assert f"ask for less, or raise --passes; what was found is in {report}" in str(result.exception)
    assert not any(each["taken"] for each in json.loads(report.with_name("front.json").read_text())["plans"])
    assert [path.name for path in tmp_path.iterdir()] == ["out-report"]


def test_refuses_too_small_a_budget(planted, data, tmp_path):
    result = run(planted, "--data", str(data), "--passes", "20", "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, UsageError)
    assert "--passes 20: too few to try a plan; raise it" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auto", "--skip", "5"], "--skip 5: --auto finds the layers itself"),
        (["--skip", "5", "--max-loss", "0.1"], "--max-loss 0.1: it is for --auto; add that"),
        (["--auto", "--max-loss", "2"], "--max-loss 2.0: it is a part of all"),
        (["--auto", "--task", "chess"], "--task chess: there is none of that name"),
        (["--auto", "--passes", "0"], "--passes 0: choose 1 or more"),
        (["--auto", "--front", "nowhere.json"], "--front nowhere.json: no front.json of vllm-ext plan --auto"),
        (["--auto", "--front", "a.json", "--quick"], "--quick True: --front has what its search was made with"),
        (["--auto", "--data", "nowhere.jsonl"], "--data nowhere.jsonl: cannot be read"),
    ],
)
def test_refuses_before_it_searches(planted, tmp_path, options, message):
    result = CliRunner().invoke(app, ["plan", str(planted), "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
