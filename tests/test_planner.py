"""The commands on a tiny model that was trained on the spot to copy from afar, with one layer that fetches."""

import json
import random
import shutil

import pytest
from typer.testing import CliRunner

from model_executors.attention_plan import AttentionPlan, LayerPlan
from tests.copying import FETCHES, LAYERS, WINDOW, text, write_copying
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.main import app
from vllm_ext.errors import UsageError
from vllm_ext.layers import changes_of
from vllm_ext.offline.model import read_tokenizer
from vllm_ext.planner import report, run
from vllm_ext.planner.judge import Goal, judge
from vllm_ext.planner.run import JOURNAL, Planner, filled, looked_beyond
from vllm_ext.planner.search import Search, Trial
from vllm_ext.planner.settings import SearchSettings
from vllm_ext.tasks.items import Item, Task

LENGTH = 60


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    return write_copying(tmp_path_factory.mktemp("copying") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts that the model can copy from, farther back than a window."""
    chosen = random.Random(1)
    file = tmp_path_factory.mktemp("data") / "far.jsonl"
    rows = [dict(zip(("prompt", "answer"), text(chosen, LENGTH), strict=True)) | {"length": LENGTH} for _ in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def options(data, *more):
    return ["--data", str(data), "--window", str(WINDOW), "--context", "512", *more]


@pytest.fixture(scope="module")
def found(copying, data, tmp_path_factory):
    """The folder of a search, through the command."""
    out = tmp_path_factory.mktemp("out") / "search"
    result = CliRunner().invoke(app, ["search", str(copying), "--out", str(out), *options(data)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "report.html")
    return out


def planner(copying, data, out):
    settings = SearchSettings((), (str(data),), windows=(WINDOW,), context=512)
    return Planner(Checkpoint.open(str(copying), weights=True), settings, out)


def test_the_scan_names_the_layer_that_fetches(found):
    scan = report.read(found / "front.json").scan
    assert scan.fetching == [FETCHES]
    assert scan.order[-1] == FETCHES
    assert scan.most(FETCHES) > 1


def test_the_search_leaves_it_alone_and_lets_the_others_go(found):
    plans = report.read(found / "front.json").plans
    assert all(FETCHES not in plan.changes for plan in plans)
    best = Goal(0.02).choose(plans)
    assert set(best.changes) == set(range(LAYERS)) - {FETCHES}
    # A window of 8 and its sink take up to 3 of a layer's 32 blocks.
    assert best.kv_saved >= 1 - (32 + 3 * 3) / (LAYERS * 32)
    assert best.kept > 0.98


def test_of_two_plans_the_one_between_saves_what_is_wanted(copying, data, found, tmp_path):
    shutil.copytree(found, tmp_path / "again")
    trials, scan = planner(copying, data, tmp_path / "again").search, report.read(found / "front.json").scan
    search = Search(trials, scan, (WINDOW,), (), (), lambda changes: len(changes) / LAYERS)
    small, large = LayerPlan("window", WINDOW), LayerPlan("window", 2 * WINDOW)
    first, second, third, last = scan.order
    assert last == FETCHES
    all_small = {first: small, second: small, third: small}
    between = search.between({}, all_small, 1 / LAYERS)
    assert between.changes == {first: small}
    assert between.missed == trials.missed({first: small})
    some = search.between({second: large, third: large, last: large}, {first: small, second: small, third: large}, 0.0)
    assert some.changes == {first: small, second: large, third: large, last: large}
    assert search.between({first: small}, {second: small}, 0.0).changes == {}
    assert search.between({first: small}, {first: small}, 0.0).changes == {first: small}
    search.saved = lambda changes: (0, 0.1, 0.4, 0.6)[len(changes)]
    for wanted, saved in ((0.0, 0.1), (0.24, 0.1), (0.26, 0.4), (0.6, 0.4)):
        assert search.saved(search.between({}, all_small, wanted).changes) == saved
    search.saved = lambda changes: (0, 0.1, 0.4, 0.3)[len(changes)]  # three are padded
    assert search.between({}, all_small, 0.15).changes == {first: small}
    search.saved = lambda changes: (0, 0.3, 0.2, 0.6)[len(changes)]  # two are padded
    assert search.between({}, all_small, 0.2).changes == {first: small}


def test_the_widest_gap_in_what_plans_save_is_filled_until_enough_are_judged():
    def windows(count):
        return dict.fromkeys(range(count), LayerPlan("window", WINDOW))

    def counts(*given, saved=len):
        def between(less, more, wanted):
            inner = range(len(less) + 1, len(more)) or [len(less)]
            return Trial(windows(min(inner, key=lambda each: abs(saved(windows(each)) - wanted))), 0.0)

        plans = [Trial(windows(each), 0.0) for each in given]
        return [len(each.changes) for each in filled(plans, saved, between)]

    assert counts(20, 12, 2) == [20, 12, 7, 2]
    assert counts(20, 2) == [20, 15, 11, 2]
    assert counts(20, 18) == [20, 18, 13, 9]
    assert counts(16) == [16, 12, 8, 4]
    assert counts(8, 6, 4, 0) == [8, 6, 4, 0]
    assert counts(16, saved=lambda changes: len(changes) / 20) == [16, 13, 10, 7]
    assert counts(15, 10, 7, saved=lambda changes: len(changes) / 20) == [15, 12, 10, 7]
    assert counts(6, saved=lambda changes: len(changes) / 20) == [6, 5]  # fewer save too little
    assert counts(2, 1) == [2, 1]
    assert counts(1) == [1]
    assert counts(0) == [0]
    assert counts() == []


def test_windows_only_are_found_where_nothing_else_is_wanted(copying, data, found, tmp_path):
    out = tmp_path / "w"
    result = CliRunner().invoke(app, ["search", str(copying), "--out", str(out), *options(data, "--windows-only")])
    assert result.exit_code == 0, result.output
    plans, with_tops = (report.read(each / "front.json").plans for each in (out, found))
    assert plans
    assert [plan.changes for plan in plans] == [
        plan.changes for plan in with_tops if all(each.kind == "window" for each in plan.changes.values())
    ]


def test_only_what_lies_above_it_is_frozen_or_skipped(found):
    plans = report.read(found / "front.json").plans
    tops = [layer for plan in plans for layer, each in plan.changes.items() if each.kind in ("freeze", "skip")]
    assert tops
    assert min(tops) > FETCHES


def test_a_plan_that_takes_it_fails_the_gate(copying, data, found, tmp_path):
    shutil.copytree(found, tmp_path / "again")
    trials = planner(copying, data, tmp_path / "again").judge
    taken = judge(trials, {FETCHES: LayerPlan("window", WINDOW)}, 0, 0.9, 0.0)
    (figure,) = taken.tasks.values()
    assert figure.ratio < 0.5
    with pytest.raises(UsageError, match=r"--max-loss 0.02: the plans found that save enough lose at least 0\.[2-9]"):
        Goal(0.02).choose([taken])


def test_choose_writes_the_plan_and_what_it_was_judged_by(copying, found, tmp_path):
    command = ["choose", str(copying), str(found / "front.json"), "--out", str(tmp_path / "planned")]
    result = CliRunner().invoke(app, [*command, "--max-loss", "0.02"])
    assert result.exit_code == 0, result.output
    written = Checkpoint.open(str(tmp_path / "planned"), weights=True)
    written.check_weights()
    best = Goal(0.02).choose(report.read(found / "front.json").plans)
    assert changes_of(written.plan) == best.changes
    judged = written.config["vllm_ext"]["judged"]
    assert judged["lengths"] == [LENGTH + 1]
    assert judged["tasks"]["far"] == pytest.approx(best.tasks["far"].ratio, abs=1e-4)


def test_a_search_that_was_stopped_goes_on(copying, data, found, tmp_path, monkeypatch):
    lines = (found / JOURNAL).read_text().splitlines(keepends=True)
    out = tmp_path / "again"
    out.mkdir()
    before = report.read(found / "front.json")
    (out / JOURNAL).write_text("".join(lines[:6]) + lines[6][:30])
    front = planner(copying, data, out).find()
    assert [each.changes for each in front.plans] == [
        each.changes for each in planner(copying, data, found).find().plans
    ]
    assert (out / JOURNAL).read_text().splitlines(keepends=True)[:6] == lines[:6]
    assert front.scan.fetching == before.scan.fetching
    monkeypatch.setattr(run, "OfflineModel", None)  # all that is needed is there
    assert len(planner(copying, data, out).find().plans) == len(before.plans)


def test_the_scan_alone_keeps_what_it_found(copying, data, tmp_path):
    result = CliRunner().invoke(app, ["search", str(copying), "--out", str(tmp_path / "q"), *options(data, "--quick")])
    assert result.exit_code == 0, result.output
    (plan,) = report.read(tmp_path / "q" / "front.json").plans
    assert set(plan.changes) == set(range(LAYERS)) - {FETCHES}
    assert plan.kept > 0.98


def test_no_window_is_tried_that_no_item_would_miss():
    items = tuple(Item((1,) * length, (1,)) for length in (10, 299))
    assert looked_beyond((1024, 150, 151, 64), [Task("own", "answers", items)]) == [64, 150]
    retrieving = Task("needles at 256", "answers", items, length=256)
    assert looked_beyond((150, 128), [Task("own", "answers", items), retrieving]) == [128]


def test_the_report_shows_what_was_found(found):
    page = (found / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(found.glob("*.png"))) == 4
    assert f"fetch are {FETCHES}." in page
    assert f"--window 0,2-3:{WINDOW}" in page
    plans = json.loads((found / "front.json").read_text())["plans"]
    assert all(AttentionPlan.from_config(each["vllm_ext"], LAYERS) for each in plans)


def test_searches_and_judges_on_other_items(copying, data, tmp_path):
    made = planner(copying, data, tmp_path / "new")
    (searched,), (judged,) = made.search.tasks, made.judge.tasks
    assert len(searched.items) == 20
    assert len(judged.items) == 40
    assert not set(searched.items) & set(judged.items)


def test_refuses_a_front_of_another_model(tiny_models, found, tmp_path):
    front = str(found / "front.json")
    result = CliRunner().invoke(app, ["choose", str(tiny_models("Qwen2")), front, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError)
    assert "it is of model of 4 layers, and this is" in str(result.exception)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan"], "plan needs --skip, --window or --freeze"),
        (["search", "--task", "chess"], "--task chess: there is none of that name"),
        (["search", "--length", "20"], "--length 20: too short to hide anything in"),
        (["search", "--window", "0"], "--window 0: choose more than 0"),
        (["search", "--length", "256", "--window", "129"], "--window 129: no item has 258 tokens, to miss what it"),
        (["search", "--items", "0"], "--items 0: choose more than 0"),
        (["search", "--data", "nowhere.jsonl"], "--data nowhere.jsonl: cannot be read"),
        (["search", "--length", "1024"], "--length 1024: the model takes 512 tokens; lower it"),
        (["choose", "nowhere.json"], "nowhere.json: no front.json of vllm-ext search"),
        (["choose", "nowhere.json", "--max-loss", "2"], "--max-loss 2.0: it is a part of all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_before_it_searches(copying, tmp_path, command, message):
    name, *more = command
    result = CliRunner().invoke(app, [name, str(copying), *more, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_is_searched_with_and_judged_on(smollm2):
    """Needles at every length, the others at the longest; the scan alone has one, and tokens for three minutes."""
    tokenizer = read_tokenizer(Checkpoint.open(str(smollm2), weights=True))
    settings = SearchSettings(("needle", "words", "uuids", "capitals"), lengths=(512, 256), items=0.2)
    names = {split: {task.name for task in settings.made(tokenizer, split)} for split in ("search", "judge")}
    assert names["search"] == {"needle at 256", "needle at 512", "words at 512", "capitals"}
    assert names["judge"] == names["search"] | {"uuids at 512"}
    quick = SearchSettings(quick=True)
    scanned = quick.made(tokenizer, "search")
    assert {task.name for task in scanned} == {"needle at 1024", "needles at 1024"}
    assert {task.name for task in quick.made(tokenizer, "judge")} == {task.name for task in scanned}
    assert sum(task.tokens for task in scanned) * 30 / 2 < 100_000
