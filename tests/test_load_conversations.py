"""What a server of known times was really asked: conversations, shared prefixes, traces and datasets, and needles."""

import json
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from loadtests.answer import read_answers
from loadtests.conversations import JUDGED
from loadtests.run import locust
from loadtests.settings import Load
from loadtests.sharegpt import read_dialogues
from loadtests.texts import Texts
from loadtests.traces import arrivals, mean_rate, read_trace
from loadtests.workloads import Workload
from tests.token_server import TOKEN
from vllm_ext.process import free_port, running

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def url():
    port = free_port()
    with running([sys.executable, "-m", "tests.token_server", str(port), "--first=0.02", "--gap=0.005"], port) as url:
        yield url


def asked(url, folder, *options, scale="0.1"):
    """Run Locust; returns the client's answers and what the server was asked, in the order of sending."""
    before = len(httpx.get(f"{url}/sent").json())
    given = ["--users=1", "--client-bound=inf", f"--scale={scale}", f"--records={folder / 'records.jsonl'}"]
    assert locust(url, [*given, *options], limit=120) == 0
    answers = [answer for answer in read_answers([folder / "records.jsonl"]) if answer.error is None]
    sent = {each["id"]: each for each in httpx.get(f"{url}/sent").json()[before:]}
    return answers, [sent[answer.id] for answer in answers]


def by_conversation(answers, sent):
    found = {}
    for answer, each in zip(answers, sent, strict=True):
        name, turn = answer.id.rsplit(".", 1)
        found.setdefault(name, {})[int(turn)] = answer, each
    return found


def test_a_conversations_next_prompt_has_all_before_it_to_the_token(url, tmp_path):
    """Also what the server answered, so that its cache can know it; others run in between."""
    options = ["--workload=conversation", "--turns=4", "--think=0.3", "--arrival=constant", "--rate=16", "--duration=4"]
    answers, sent = asked(url, tmp_path, *options, "--warmup=0")
    conversations = by_conversation(answers, sent)
    assert len(conversations) > 8
    whole = [turns for turns in conversations.values() if set(turns) == {0, 1, 2, 3}]
    assert whole
    for turns in whole:
        for turn in range(1, 4):
            (before, was), (now, is_) = turns[turn - 1], turns[turn]
            begun = was["prompt"] + [TOKEN] * was["tokens"]
            assert is_["prompt"][: len(begun)] == begun
            assert is_["cached"] >= (len(begun) // 16) * 16
            assert now.intended >= before.end
            assert now.sent >= now.intended
    thought = [turns[turn][0].intended - turns[turn - 1][0].end for turns in whole for turn in range(1, 4)]
    assert np.mean(thought) == pytest.approx(0.3, rel=0.5)
    order = [answer.id.rsplit(".", 1)[0] for answer in answers]
    assert any(order[place] != order[place + 1] for place in range(len(order) - 1))


def test_conversations_are_as_many_requests_as_asked_from_the_start_on(url, tmp_path):
    """They are met in their middles: turns of every place at once, at the rate asked for."""
    options = ["--workload=conversation", "--turns=5", "--think=0.5", "--arrival=constant", "--rate=20"]
    answers, _ = asked(url, tmp_path, *options, "--warmup=0", "--duration=6", scale="0.05")
    start = min(answer.intended for answer in answers)
    measured = [answer for answer in answers if answer.intended < start + 6]
    assert len(measured) / 6 == pytest.approx(20, rel=0.25)
    first_second = {int(answer.id.rsplit(".", 1)[1]) for answer in answers if answer.intended < start + 1}
    assert len(first_second) >= 3


def test_shared_prefixes_of_a_share_and_number(url, tmp_path):
    options = ["--workload=chat", "--prefixes=3", "--prefix-tokens=640", "--prefix-share=0.5", "--arrival=constant"]
    before = httpx.get(f"{url}/metrics").text
    _, sent = asked(url, tmp_path, *options, "--rate=30", "--duration=4", "--warmup=0", "--seed=4")
    prefixes = [tuple(each["prompt"][:64]) for each in sent]
    counts = sorted((prefixes.count(each) for each in set(prefixes)), reverse=True)
    assert len([count for count in counts if count > 1]) == 3
    assert sum(count for count in counts if count > 1) / len(sent) == pytest.approx(0.5, abs=0.15)
    assert sum(each["cached"] >= 64 for each in sent) >= sum(count for count in counts if count > 1) - 3
    assert "prefix_cache_hits_total" in before


def test_mooncakes_trace_has_the_same_tokens_for_the_same_ids_and_its_own_gaps(url, tmp_path):
    file = DATA / "mooncake.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    answers, sent = asked(url, tmp_path, "--workload=trace", f"--trace={file}", "--speed=4", scale="0.0625")
    assert len(sent) == len(rows)
    blocks, block = {}, 512 // 16
    for row, each in zip(rows, sent, strict=True):
        assert len(each["prompt"]) == max(1, round(row["input_length"] / 16))
        assert each["tokens"] == max(1, round(row["output_length"] / 16))
        for place, name in enumerate(row["hash_ids"]):
            tokens = tuple(each["prompt"][place * block : (place + 1) * block])
            if len(tokens) == block:
                assert blocks.setdefault(name, tokens) == tokens
    assert len(set(blocks.values())) == len(blocks) > 3
    gaps = np.diff([answer.intended for answer in answers])
    assert gaps == pytest.approx(np.diff([row["timestamp"] / 4000 for row in rows]), abs=1e-6)
    arrived = np.diff([each["arrived"] for each in sent])
    assert np.median(np.abs(arrived - gaps)) < 0.1


def test_burstgpts_trace_leaves_out_what_failed():
    trace = read_trace(DATA / "burstgpt.csv")
    lines = (DATA / "burstgpt.csv").read_text().splitlines()[1:]
    assert 0 < len(trace) < len(lines)
    assert trace[0].arrival == 5.0
    workload = Workload("trace", "m", trace=trace)
    requests = [workload.request(number) for number in range(len(trace))]
    assert [request.prompt_tokens for request in requests] == [each.prompt_tokens for each in trace]
    assert [request.answer_tokens for request in requests] == [each.answer_tokens for each in trace]


def test_a_trace_is_repeated_at_any_rate_with_other_blocks():
    trace = read_trace(DATA / "mooncake.jsonl")
    load = Load(workload="trace", trace=str(DATA / "mooncake.jsonl"), speed=0, rate=7.0)
    workload = load.asks("m")
    times = [time for (time, _), _ in zip(load.sends(workload), range(3 * len(trace)), strict=False)]
    assert (len(times) - 1) / times[-1] == pytest.approx(7.0, rel=0.15)
    lap = [workload.request(number + len(trace)).body for number in range(len(trace))]
    assert not {workload.request(number).body for number in range(len(trace))} & set(lap)
    assert list(arrivals(trace, 2.0)) == [each.arrival / 2 for each in trace]
    assert mean_rate(trace) > 0


def test_sharegpts_dialogues_are_asked_as_chat(url, tmp_path):
    file = DATA / "sharegpt.json"
    dialogues = {each.turns for each in read_dialogues(file)}
    answers, sent = asked(
        url, tmp_path, "--workload=dataset", f"--dataset={file}", "--api=chat", "--think=0.1", "--arrival=constant",
        "--rate=10", "--duration=3", scale="1",
    )  # fmt: skip
    firsts = {turns[0][0] for turns in dialogues}
    assert {each["prompt"][0]["content"] for each in sent} <= firsts
    later = [each for each in sent if len(each["prompt"]) > 1]
    assert later
    words = {turn[0]: len(turn[1].split()) for turns in dialogues for turn in turns}
    for answer, each in zip(answers, sent, strict=True):
        assert [message["role"] for message in each["prompt"]] == (["user", "assistant"] * 9)[: len(each["prompt"])]
        assert answer.answer_tokens == words[each["prompt"][-1]["content"]] + 5  # the server's count has a template


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "no JSON"),
        ("[1]", "it is not"),
        ("[]", "nothing in it"),
        ('[{"conversations": [{"from": "gpt"}]}]', "nothing"),
    ],
)
def test_a_dataset_that_is_none_is_named(tmp_path, text, why):
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"dataset data.json: {why}"):
        read_dialogues(file)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_needles_are_about_as_long_as_other_prompts_and_judged_by_their_number(api):
    workload = Workload("summarise", "m", api, needles=0.4, texts=Texts() if api == "chat" else None)
    requests = [workload.request(number) for number in range(200)]
    needles = [request for request in requests if request.expected]
    assert len(needles) / 200 == pytest.approx(0.4, abs=0.1)
    for request in needles:
        body = json.loads(request.body)
        text = body["prompt"] if api == "completions" else body["messages"][0]["content"]
        assert text.count(f"is: {request.expected}.") == 1
        assert len(text) / 4.4 == pytest.approx(request.prompt_tokens, rel=0.25)
        assert request.judge(f" {request.expected}. The", ended=True) is True
        assert request.judge("1234567890", ended=True) is False
        assert request.judge("1234567890", ended=False) is None
        assert request.judge(f"{request.expected}{'.' * JUDGED}", ended=False) is True
        assert request.judge(f"{'.' * JUDGED}{request.expected}", ended=False) is False
    assert len({request.expected for request in needles}) == len(needles)
    assert all(request.judge("", ended=True) is None for request in requests if not request.expected)
