"""The command on the real model, against plain transformers, and what a mistake gets."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from model_executors.attention_plan import LayerPlan
from tests.command import vllm_ext
from tests.reference import Reference
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.embedded.model import fetch_heads
from vllm_ext.errors import UsageError
from vllm_ext.offline.evaluator import Evaluator
from vllm_ext.offline.model import OfflineModel
from vllm_ext.planned_checkpoint import write_planned
from vllm_ext.quality.command import candidates, engine_arguments, measure, scores_of
from vllm_ext.quality.kept import Kept
from vllm_ext.quality.work import Asked, QualitySettings, Replies, Work, prepare_work
from vllm_ext.reports.figures import Scored
from vllm_ext.served import Served
from vllm_ext.tasks.items import Item, Task

COMMAND = [sys.executable, "-m", "vllm_ext.cli.main", "quality"]
LENGTH = 128
ANSWER = LENGTH // 4
PLANNED = "skip 29, freeze 20-28"
CHANGES = {layer: LayerPlan("freeze") for layer in range(20, 29)} | {29: LayerPlan("skip")}
SETTINGS = QualitySettings((LENGTH,), tokens=8 * LENGTH, items=12, task_lengths=(2 * LENGTH,), task_items=8)
FLOAT32 = ("--dtype", "float32")
WORK = Work({LENGTH: [[1] * LENGTH] * 8}, {"capitals": [[1]], "sums": [[1]]})


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    """One run of the command: what it prints, the figures it writes, and where."""
    file = tmp_path_factory.mktemp("quality") / "figures.json"
    sizes = ["--length", str(LENGTH), "--tokens", str(SETTINGS.tokens), "--items", str(SETTINGS.items)]
    sizes += ["--task-length", str(2 * LENGTH), "--task-items", str(SETTINGS.task_items)]
    plan = ["--skip", "29", "--freeze", "20-28"]
    command = [*COMMAND, str(smollm2), *plan, *sizes, "--json", str(file), *FLOAT32]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())["figures"], file


@pytest.fixture(scope="module")
def work(smollm2):
    return prepare_work(AutoTokenizer.from_pretrained(smollm2), SETTINGS)


@pytest.fixture(scope="module")
def expected(smollm2, work):
    """For each model, `[passages, tokens, vocab_size]` log-probabilities of the tokens after the first."""
    found = {}
    for name, plans in (("stock", {}), (PLANNED, CHANGES)):
        reference = Reference(smollm2, plans)
        reference.prompt_length = LENGTH - ANSWER
        with torch.no_grad():
            found[name] = torch.stack([reference.logprobs(text)[:-1] for text in work[0].passages[LENGTH]])
    return found


def perplexity(logprobs: torch.Tensor, passages: list[list[int]], places: slice) -> float:
    targets = torch.tensor(passages)[:, 1:, None]
    return logprobs.gather(2, targets)[:, places].mean().neg().exp().item()


def test_perplexity_as_in_transformers(run, work, expected):
    _, figures, _ = run
    passages = work[0].passages[LENGTH]
    stock = figures["stock"]["perplexity"][str(LENGTH)]
    assert stock["value"] == pytest.approx(perplexity(expected["stock"], passages, slice(None)), rel=0.02)
    assert stock["items"] == len(passages) == 8
    for name in ("stock", PLANNED):
        answers = figures[name]["answer_perplexity"][str(LENGTH)]
        assert answers["value"] == pytest.approx(perplexity(expected[name], passages, slice(-ANSWER, None)), rel=0.03)
    assert answers["interval"][0] < answers["ratio"] < answers["interval"][1]


def test_agreement_as_in_transformers(run, expected):
    _, figures, _ = run
    tops = [each[:, -ANSWER:].argmax(-1).numpy() for each in expected.values()]
    agreement = figures[PLANNED]["answer_agreement"][str(LENGTH)]["value"]
    assert 0.4 < agreement < 0.9
    assert agreement == pytest.approx(np.mean(tops[0] == tops[1]), abs=0.03)


def test_says_nothing_of_frozen_prompt_tokens(run):
    _, figures, _ = run
    assert figures[PLANNED]["perplexity"] == figures[PLANNED]["agreement"] == {}


def test_retrieves_what_is_retrieved_offline(run, smollm2, work, monkeypatch):
    """Item by item, under stock and under a plan that treats prompts and answers differently."""
    _, figures, file = run
    asked = [
        Asked(Served.open(str(smollm2), plans), [*engine_arguments(work[0]), *FLOAT32], work[0])
        for plans in (None, CHANGES)
    ]
    served = [Kept(file.with_name("figures-replies")).read(each) for each in asked]
    monkeypatch.setattr("vllm_ext.offline.model.slow_on_cpu", lambda _: True)  # so that it is in float32 too
    model = OfflineModel(Checkpoint.open(str(smollm2), weights=True))
    seen = set()
    for task in work[0].retrieved:
        offline = Evaluator(model, task)
        for name, plans, replies in zip(("stock", PLANNED), ({}, CHANGES), served, strict=True):
            expected, ours = offline.plan(plans, {}), replies.retrieved[task.name]
            assert scores_of(task, ours) == expected.scores
            assert [-np.mean(each.logprobs) for each in ours] == pytest.approx(expected.nll, abs=1e-4)
            figure = figures[name]["retrieved"][task.name]
            assert (figure["value"], figure["items"]) == (np.mean(expected.scores), SETTINGS.task_items)
            seen.update(expected.scores)
    assert seen == {0, 1}


def test_scores_whole_answers_or_their_tokens():
    items = (Item((1,), (4, 5, 6, 7)), Item((2,), (8, 9)))
    replies = [Scored([-1.0] * 4, [4, 5, 0, 7]), Scored([-1.0] * 2, [8, 9])]
    assert scores_of(Task("t", "answers", items), replies) == [0, 1]
    assert scores_of(Task("t", "tokens", items), replies) == [0.75, 1]


def test_an_engine_takes_every_prompt_with_its_answer():
    far = Task("far", "answers", (Item((1,) * 300, (2,) * 9), Item((1,) * 20, (2,))))
    work = replace(WORK, retrieved=(far,))
    assert WORK.max_model_len == LENGTH + 1
    assert work.max_model_len == 309
    assert work.tokens == WORK.tokens + 320


def test_retrieves_at_every_length(work):
    assert [task.name for task in work[0].retrieved] == [f"{name} at {2 * LENGTH}" for name in ("needle", "needles")]
    for task in work[0].retrieved:
        assert all(1.5 * LENGTH < len(each.prompt + each.answer) <= 2 * LENGTH for each in task.items)
    usual = QualitySettings()
    assert (usual.tasks, usual.task_lengths) == (("needle", "needles"), (512, 1_024))


def test_prints_a_table(run):
    stdout, figures, _ = run
    assert stdout.index("retrieved, needle at 256 tokens") < stdout.index("perplexity")
    for title in ("retrieved, needles at 256 tokens", "perplexity", "top token", "capitals", "sums", PLANNED):
        assert title in stdout
    assert f"{figures['stock']['capitals']['value']:.3f}" in stdout


def test_asks_what_the_stock_model_can_answer(run):
    _, figures, _ = run
    for task in ("capitals", "sums"):
        assert 0.1 < figures["stock"][task]["value"] < 0.9
        assert figures["stock"][task]["items"] == SETTINGS.items


def test_work_is_the_same_every_time(smollm2, work):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert prepare_work(tokenizer, SETTINGS) == work
    other = prepare_work(tokenizer, QualitySettings(SETTINGS.lengths, SETTINGS.tokens, SETTINGS.items, seed=1))
    assert other != work


def test_no_example_is_the_question(smollm2, work):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = tokenizer.batch_decode(work[0].prompts["capitals"])
    for prompt in prompts:
        questions = [line for line in prompt.splitlines() if line.startswith("Q: ")]
        assert len(set(questions)) == len(questions) == 5
    assert tokenizer.decode(work[0].prompts["sums"][0]).count(", ") == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (4,)}, "--length 4: too short"),
        ({"lengths": (64, 64)}, "--length 64: named twice"),
        ({"tokens": 100}, "--tokens 100: less than one passage of 512"),
        ({"items": 0}, "--items 0: choose 1 to 1000"),
        ({"tasks": ("needle", "pins")}, "--task pins: there is none of that name; take needle, needles, values"),
        ({"tasks": ("needle", "needle")}, "--task needle: named twice"),
        ({"task_lengths": (100,)}, "--task-length 100: too short to hide anything in; take 128"),
        ({"task_items": 0}, "--task-items 0: choose 1 to 1000"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        QualitySettings(**settings)


def test_refuses_models_that_cannot_be_compared(smollm2, tiny_models, tmp_path):
    source = Checkpoint.open(str(smollm2), weights=True)
    planned = tmp_path / "planned"
    write_planned(source, source.planned({29: LayerPlan("skip")}), planned)
    with pytest.raises(UsageError, match="it has an attention plan; give the stock model"):
        measure(str(planned), {}, SETTINGS)
    with pytest.raises(UsageError, match="have the same name"):
        candidates(str(smollm2), [str(planned), str(planned)])
    with pytest.raises(UsageError, match="its vocab_size is 256, the stock model's 49152"):
        measure(str(smollm2), {"tiny": Served.open(str(tiny_models("Llama")))}, SETTINGS)
    with pytest.raises(UsageError, match="--length 2048: the model takes 511 tokens at most"):
        measure(str(tiny_models("Llama")), {}, QualitySettings())
    with pytest.raises(UsageError, match="--task-length 1024: the model takes 512 tokens at most"):
        measure(str(tiny_models("Llama")), {}, replace(SETTINGS, task_lengths=(512, 1024)))
    with pytest.raises(UsageError, match="no tokenizer is to be had"):
        measure(str(tiny_models("Llama")), {}, SETTINGS)


def test_goes_on_where_it_was_stopped(smollm2, tmp_path, monkeypatch):
    """The second of two fails; another run does it alone, and one with other options does both."""
    ran, replies = [], Replies({}, {LENGTH: [Scored([-1.0] * ANSWER, [1] * ANSWER)] * 8}, {"capitals": [], "sums": []})

    def reply(asked, advance):
        ran.append(asked.served.plan and "planned")
        if ran == [None, "planned"]:
            raise UsageError("the engine failed")
        return replies

    monkeypatch.setattr("vllm_ext.quality.command._reply", reply)
    monkeypatch.setattr("vllm_ext.quality.command.figures_of", lambda ours, *_: ours)
    beside = {"planned": Served.open(str(smollm2), {29: LayerPlan("skip")})}

    monkeypatch.setattr("vllm_ext.quality.command.prepare_work", lambda *_: (WORK, {"capitals": [], "sums": []}))
    with pytest.raises(UsageError, match="the engine failed"):
        measure(str(smollm2), beside, SETTINGS, (), tmp_path / "kept")
    ran.append("a second run")
    found = measure(str(smollm2), beside, SETTINGS, (), tmp_path / "kept")
    assert ran == [None, "planned", "a second run", "planned"]
    assert found == {"stock": replies, "planned": replies}
    # What is damaged is not believed.
    for file in (tmp_path / "kept").iterdir():
        file.write_text(file.read_text()[:-9])
    measure(str(smollm2), beside, SETTINGS, (), tmp_path / "kept")
    assert ran[4:] == [None, "planned"]
    measure(str(smollm2), beside, SETTINGS, (), tmp_path / "kept")
    assert ran[6:] == []
    measure(str(smollm2), beside, SETTINGS, ("--max-num-seqs", "7"), tmp_path / "kept")
    assert ran[6:] == [None, "planned"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_fits_80_columns_in_a_pipe(encoding, tmp_path):
    code = """
from vllm_ext.errors import told_in_one_line
from vllm_ext.quality.report import Figures, show
from vllm_ext.reports.figures import Figure
one = Figure(18.92, 24, 1.062, (1.055, 1.070))
figures = Figures({"needles at 1024": one}, *[{2048: one}] * 4, one, one)
names = ["stock", *(f"a-checkpoint-planned at 0.9{n}" for n in range(9)), "x" * 200]
report = {"model": "SmolLM2", "vllm": "vllm 0", "machine": "m", "prose": "p"}
report["settings"] = {"lengths": [2048], "seed": 0}
with told_in_one_line():
    show(report, dict.fromkeys(names, figures))
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    lines = done.stdout.decode(encoding).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("a-checkpoint-planned at 0.98" in line and "1.055-1.070" in line for line in lines) == 7
    titles = [line for line in lines if line.startswith(("retrieved", "perplexity"))]
    assert titles[0].startswith("retrieved, needles at 1024 tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agreements": [0.98]}, "--agreement 0.98: it is for planned checkpoints with character heads; add --planned"),
        ({"head": "character"}, "--head character: it is for planned checkpoints with character heads; add --planned"),
        ({"head": "rescored", "changes": {29: LayerPlan("skip")}}, "--head rescored: it is for planned checkpoints"),
    ],
)
def test_no_option_is_ignored(smollm2, options, message):
    with pytest.raises(UsageError, match=message):
        candidates(str(smollm2), **options)


def test_candidates_by_name(smollm2):
    spelled = str(fetch_heads())
    name = Path(spelled).name
    found = candidates(str(smollm2), [spelled], {29: LayerPlan("skip")}, "character", [0.98], overlaid="skip 29")
    assert list(found) == [name, f"{name} at 0.98", "skip 29"]
    plain, agreeing, skipped = found.values()
    assert plain.head.kind == agreeing.head.kind == "character"
    assert 0 < agreeing.head.threshold < 1
    assert skipped.plan.skipped == [29]
    assert not skipped.head.is_character


def test_refuses_what_vllm_refuses_in_one_line(smollm2, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models("Llama"), tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, folder / name)
    with pytest.raises(UsageError, match=r"max_model_len \(9999\) is greater than") as refusal:
        measure(str(folder), {}, SETTINGS, ["--max-model-len", "9999"])
    assert "\n" not in str(refusal.value)


def test_a_mistake_is_one_line(smollm2, tmp_path):
    nowhere = str(tmp_path / "nowhere" / "figures.json")
    done = vllm_ext("quality", smollm2, "--json", nowhere)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: --json {nowhere}: no such folder; create {tmp_path / 'nowhere'}"
