"""Files that people hand in, spoilt in every way: a mistake is one line, and never a traceback."""

import json
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer

from model_executors.attention_plan import CONFIG_KEY
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.embedded.model import fetch_heads
from vllm_ext.errors import UsageError
from vllm_ext.planner.report import read as read_front
from vllm_ext.reports.journal import Journal
from vllm_ext.served import Served
from vllm_ext.tasks.files import read_task
from vllm_ext.tasks.passages import read_texts

SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


def spoilt(content, data):
    """A copy in which something, at any depth, is another thing, or is not there."""
    content = json.loads(json.dumps(content))
    at = content
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        if data.draw(st.booleans()):
            at[key] = data.draw(JSON)
        else:
            del at[key]
        return content


def told(call):
    """Whatever is wrong is one line."""
    refused = None
    try:
        return call()
    except UsageError as error:
        refused = error
    assert "\n" not in str(refused)
    return None


@pytest.fixture(scope="module")
def planned():
    """A planned checkpoint's configuration, with every entry that we write."""
    config = json.loads((fetch_heads() / "config.json").read_text())
    layers = ["full"] * 20 + [{"kind": "window", "window": 64, "sink": 4}] * 5 + [{"kind": "skip"}] * 5
    config[CONFIG_KEY]["attention_plan"] = layers
    return config


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def with_its_weights(folder):
    checkpoint = Checkpoint.open(str(folder), weights=False)
    checkpoint.check_weights()
    return checkpoint


def serve(folder):
    for options in ({}, {"head": "character", "agreement": 0.9}, {"head": "stock"}):
        served = told(partial(Served.open, str(folder), **options, vllm_args=["--load-format", "dummy"]))
        if served is not None:
            assert len(served.attention_plan.layers) == served.checkpoint.num_layers
            served.hf_overrides()


@SETTINGS
@given(data=st.data())
def test_a_planned_configuration(planned, tmp_path, data):
    (tmp_path / "config.json").write_text(json.dumps(spoilt(planned, data)))
    serve(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    head = told(lambda: with_its_weights(tmp_path).head)
    assert head is None or not head.is_character  # a character head's tensors are not there


@SETTINGS
@given(content=st.binary(max_size=99) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_configuration(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    serve(tmp_path)


@SETTINGS
@given(content=st.binary(max_size=99), index=JSON, named=JSON)
@example(content=b"", index={}, named="a\nb")
def test_any_weights(planned, tmp_path, content, index, named):
    (tmp_path / "config.json").write_text(json.dumps(planned))
    (tmp_path / "model.safetensors").write_bytes(content)
    told(Checkpoint.open(str(tmp_path), weights=False).check_weights)
    for whole in (index, {"weight_map": index}, {"weight_map": {"a": named}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(whole))
        with pytest.raises(UsageError) as refused:
            Checkpoint.open(str(tmp_path), weights=False).check_weights()
        assert "\n" not in str(refused.value)


@SETTINGS
@given(data=st.data())
def test_a_front(tmp_path, data):
    front = {
        "header": {"layers": 2, "settings": {"seed": 0}},
        "scan": {"window": 64, "lost": {"needle": {"0": 0.1}}, "heads": {"0": [0.1]}},
        "plans": [
            {
                CONFIG_KEY: {"attention_plan": ["full", {"kind": "window", "window": 64, "sink": 4}]},
                "tasks": {"needle": {"value": 1.0, "items": 4, "ratio": 1.0, "interval": [0.9, 1.0]}},
                **{"kv_saved": 0.5, "prefill_saved": 0.1, "kept": 1.0, "missed": 0.0, "depths": {}},
            }
        ],
    }
    (tmp_path / "front.json").write_text(json.dumps(front))
    assert read_front(tmp_path / "front.json").plans
    (tmp_path / "front.json").write_text(json.dumps(spoilt(front, data)))
    told(lambda: read_front(tmp_path / "front.json"))


@SETTINGS
@given(lines=st.lists(JSON.map(json.dumps) | st.text(max_size=9) | st.just('{"text": "whole"}'), max_size=4))
def test_lines_of_text(tmp_path, lines):
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    found = told(lambda: read_texts(tmp_path / "text.jsonl"))
    if found is not None:
        assert all(isinstance(text, str) for text in found)


ROWS = st.sampled_from(
    [
        {"prompt": "Where?", "answer": " There"},
        {"input": "Where?", "outputs": ["here", "there"], "length": 9},
        {"input": "Where?", "context": "Here.", "answers": ["here"]},
        {"context": "Here.", "question": "Where?", "answers": {"text": ["here"]}},
        {"article": "Here it is.", "highlights": "here"},
        {
            "data": [
                {"paragraphs": [{"context": "Here.", "qas": [{"question": "Where?", "answers": [{"text": "here"}]}]}]}
            ]
        },
    ]
)


@SETTINGS
@given(rows=st.lists(ROWS, min_size=1, max_size=3), data=st.data())
def test_tasks(tokenizer, tmp_path, rows, data):
    lines = [spoilt(row, data) if data.draw(st.booleans()) else row for row in rows]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = told(lambda: read_task(tmp_path / "task.jsonl", tokenizer, 2))
    if task is not None:
        assert 1 <= len(task.items) <= 2
        assert task.score == "summaries" or all(each.prompt and each.answer for each in task.items)


@SETTINGS
@given(lines=st.lists(JSON.map(json.dumps) | st.just('{"key": 1}') | st.text(max_size=9), max_size=3))
def test_a_journal(tmp_path, lines):
    file = tmp_path / "trials.jsonl"
    file.write_text("".join(line + "\n" for line in [json.dumps({"of": 1}), *lines]), encoding="utf-8")
    journal = told(lambda: Journal(file, {"of": 1}, ("key",)))
    assert journal is None or len(journal.rows) <= len(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"of": 2}\n{"other": 1}\n', "of other settings"), (b"\xff\n", "damaged"), (b'{"of": 1}\n[]\n', "damaged")],
)
def test_a_journal_of_other_settings_is_not_called_damaged(tmp_path, content, message):
    (tmp_path / "trials.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Journal(tmp_path / "trials.jsonl", {"of": 1}, ("key",))


@pytest.mark.parametrize("read", ["config", "front", "text", "task"])
def test_what_is_nested_without_end(tokenizer, tmp_path, read):
    names = {"config": "config.json", "front": "front.json", "text": "text.jsonl", "task": "task.jsonl"}
    file = tmp_path / names[read]
    file.write_text("[" * 100_000)
    calls = {
        "config": lambda: Checkpoint.open(str(tmp_path), weights=False),
        "front": lambda: read_front(file),
        "text": lambda: read_texts(file),
        "task": lambda: read_task(file, tokenizer, 2),
    }
    with pytest.raises(UsageError):
        calls[read]()
