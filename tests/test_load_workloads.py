"""Requests of exact lengths from a seed, none twice."""

import json

import numpy as np
import pytest

from loadtests.settings import Load
from loadtests.texts import Texts, single_token_words
from loadtests.traces import arrivals, read_trace
from loadtests.workloads import PROFILES, Workload


def bodies(workload, count=40):
    return [json.loads(workload.request(number).body) for number in range(count)]


@pytest.mark.parametrize("profile", [*PROFILES, "mixed"])
def test_lengths_are_exact_and_prompts_unique(profile):
    workload = Workload(profile, "m", scale=0.25)
    requests = [workload.request(number) for number in range(40)]
    asked = [json.loads(request.body) for request in requests]
    assert [len(body["prompt"]) for body in asked] == [request.prompt_tokens for request in requests]
    assert [body["max_tokens"] for body in asked] == [request.answer_tokens for request in requests]
    assert len({tuple(body["prompt"]) for body in asked}) == 40
    shared = {tuple(body["prompt"][:4]) for body in asked}
    assert len(shared) == (1 if profile in ("sharedprefix", "agent") else 40)
    if profile in PROFILES:
        low, high = PROFILES[profile].answer
        assert all(round(low / 4) <= body["max_tokens"] <= round(high / 4) for body in asked)


def test_the_seed_decides_and_profiles_share_nothing():
    same, other = Workload("chat", "m", seed=1), Workload("chat", "m", seed=2)
    assert bodies(same) == bodies(Workload("chat", "m", seed=1))
    assert all(ours["prompt"] != theirs["prompt"] for ours, theirs in zip(bodies(same), bodies(other), strict=True))
    rag = Workload("rag", "m", seed=1)
    assert all(
        ours["prompt"][:8] != theirs["prompt"][:8] for ours, theirs in zip(bodies(same), bodies(rag), strict=True)
    )


def test_chat_is_exact_by_the_models_own_tokenizer(smollm2):
    from loadtests.tokenizers import _local

    count = _local(str(smollm2), "chat")
    texts = single_token_words(count)
    assert texts.exact
    workload = Workload("chat", "m", api="chat", texts=texts)
    for number in range(20):
        request = workload.request(number)
        (message,) = json.loads(request.body)["messages"]
        assert count(message["content"]) == request.prompt_tokens


def test_texts_differ_by_their_own_seed_and_lengths_do_not():
    first, second = (Workload("rag", "m", seed=3, text_seed=text) for text in (8, 9))
    for ours, theirs in zip(bodies(first), bodies(second), strict=True):
        assert (len(ours["prompt"]), ours["max_tokens"]) == (len(theirs["prompt"]), theirs["max_tokens"])
        assert ours["prompt"][:8] != theirs["prompt"][:8]
    assert first.request(0).id != second.request(0).id


@pytest.mark.parametrize("profile", ["generate", "mixed"])
def test_requests_under_way_are_as_a_server_at_work_holds_them(profile):
    """Beside a plain simulation: requests that take a second a token, arriving evenly, looked at at one time."""
    workload = Workload(profile, "m", scale=0.25)
    met = []
    for number in range(8 * 256):
        request, age = workload.request(number), number / 8
        if age < request.answer_tokens:
            met.append((request.prompt_tokens + age, request.answer_tokens - age))
    found = [(request.prompt_tokens, request.answer_tokens) for request in workload.under_way(len(met))]
    assert len(met) > 500
    assert [sum(each) / len(met) for each in zip(*found, strict=True)] == pytest.approx(
        [sum(each) / len(met) for each in zip(*met, strict=True)], rel=0.1
    )
    assert min(answer for _, answer in found) >= 1


def test_requests_under_way_are_each_at_another_part_of_their_answers():
    workload = Workload("generate", "m")
    for count in (0, 1, 2, 7):
        found = list(workload.under_way(count))
        left = sorted(request.answer_tokens for request in found)
        assert [request.id for request in found] == [f"generate-0--{place + 1}" for place in range(count)]
        assert all(512 * place / count <= each <= 1024 * (place + 1) / count for place, each in enumerate(left))


@pytest.mark.parametrize("profile", ["chat", "mixed"])
def test_requests_that_come_evenly_are_as_long_as_others_and_any_few_are_about_as_long(profile):
    lengths = {}
    for arrival in ("constant", "poisson"):
        workload = Load(workload=profile, arrival=arrival, scale=0.25, needles=0.2).asks("m")
        found = [workload.request(number) for number in range(2000)]
        lengths[arrival] = np.array([(each.prompt_tokens, each.answer_tokens, bool(each.expected)) for each in found])
    even, chance = lengths["constant"], lengths["poisson"]
    assert even.mean(axis=0) == pytest.approx(chance.mean(axis=0), rel=0.1)
    assert even.std(axis=0) == pytest.approx(chance.std(axis=0), rel=0.1)
    assert np.corrcoef(even.T)[0, 1] == pytest.approx(np.corrcoef(chance.T)[0, 1], abs=0.1)
    few = {name: each.reshape(-1, 5, 3).mean(axis=1).std(axis=0) for name, each in lengths.items()}
    assert (few["constant"] < 0.8 * few["poisson"]).all()


def test_replays_a_trace(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        {"arrival": 1.5, "prompt_tokens": 7, "answer_tokens": 3},
        {"arrival": 0, "prompt_tokens": 9, "answer_tokens": 4},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    workload = Workload("trace", "m", trace=read_trace(file))
    requests = [workload.request(number) for number in range(2)]
    assert list(arrivals(workload.trace, speed=2)) == [0.0, 0.75]
    assert [(len(json.loads(each.body)["prompt"]), each.answer_tokens) for each in requests] == [(9, 4), (7, 3)]


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"arrival": -1, "prompt_tokens": 1, "answer_tokens": 1}'])
def test_names_the_line_of_a_trace_that_is_none(tmp_path, line):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"arrival": 0, "prompt_tokens": 9, "answer_tokens": 4}}\n{line}\n')
    with pytest.raises(ValueError, match=r"trace trace.jsonl, line 2"):
        read_trace(file)
    with pytest.raises(ValueError, match="No such file"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize(
    "given", [{"profile": "talk"}, {"api": "images"}, {"scale": 0.0}, {"vocab_size": 10}, {"api": "chat"}]
)
def test_refuses_nonsense(given):
    with pytest.raises(ValueError, match=r"workload|api|scale|vocab"):
        Workload(**({"profile": "chat", "model": "m"} | given))


def test_words_that_are_not_one_token_each_are_refused():
    with pytest.raises(ValueError, match="only 0 of"):
        single_token_words(len)
    assert Texts().exact is False
