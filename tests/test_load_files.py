"""Files that people hand in are read or refused in one line: never another error, never a part of one believed."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtests.guidellm import read_guidellm
from loadtests.sharegpt import read_dialogues
from loadtests.traces import read_trace

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("arrival", "prompt_tokens", "answer_tokens", "timestamp", "input_length", "output_length", "hash_ids")
rows = st.dictionaries(st.sampled_from(NAMES), values | st.integers(1, 99), max_size=6)
said = st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt"]) | values, "value": values})
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(read, file, what):
    try:
        return read(file)
    except ValueError as error:
        complaint = str(error)
    assert "\n" not in complaint
    assert what in complaint
    return None


@FUZZ
@given(lines=st.lists(rows.map(json.dumps) | st.text(max_size=40), max_size=4), head=st.booleans())
def test_traces(tmp_path, lines, head):
    file = tmp_path / "trace"
    text = "\n".join((["Timestamp,Model,Request tokens,Response tokens"] if head else []) + lines)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    trace = read_or_refuse(read_trace, file, "trace")
    for each in trace or ():
        assert each.arrival >= 0
        assert each.prompt_tokens >= 1
        assert each.answer_tokens >= 1


@FUZZ
@given(
    content=values | st.lists(st.fixed_dictionaries({"conversations": values | st.lists(said, max_size=4)}), max_size=3)
)
def test_datasets(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    for each in read_or_refuse(read_dialogues, file, "data.json") or ():
        assert all(isinstance(text, str) and text.strip() for turn in each.turns for text in turn)


@FUZZ
@given(content=values, benchmarks=values)
def test_benchmarks(tmp_path, content, benchmarks):
    file = tmp_path / "benchmarks.json"
    for each in (content, {"metadata": {"version": 2}, "benchmarks": benchmarks}):
        file.write_text(json.dumps(each))
        read_or_refuse(read_guidellm, file, "benchmarks.json")


@pytest.mark.parametrize("read", [read_trace, read_dialogues, read_guidellm])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\x00" * 9])
def test_bytes_that_are_no_text(tmp_path, read, content):
    file = tmp_path / "bytes"
    file.write_bytes(content)
    assert read_or_refuse(read, file, "bytes") is None
