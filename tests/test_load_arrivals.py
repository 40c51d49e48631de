"""Schedules, the true queueing delay of an open loop, and the planted knee."""

import heapq
import itertools
import json
import math
import socket
import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from loadtests.answer import CUT, Objective, read_answers
from loadtests.arrivals import schedule
from loadtests.compare import first_guess
from loadtests.run import locust, run, warm_up
from loadtests.saturation import saturate
from loadtests.settings import Load
from loadtests.texts import Texts
from vllm_ext.process import free_port, running

SLOTS, FIRST, GAP, TOKENS = 4, 0.1, 0.02, 6
SERVICE = FIRST + (TOKENS - 1) * GAP
CAPACITY = SLOTS / SERVICE

ANY = ["--client-bound=inf"]  # as other work of this machine may hold the client up


@pytest.fixture(scope="module")
def url():
    """A server that answers four requests at once, 0.2 s each: 20 a second."""
    port = free_port()
    shape = ["--slots", SLOTS, "--first", FIRST, "--gap", GAP, "--tokens", TOKENS]
    with running([sys.executable, "-m", "tests.token_server", str(port), *map(str, shape)], port) as url:
        yield url


def queue_delays(arrivals, services):
    """A plain simulation: first come, first served; when each of the servers is next free."""
    free, delays = [0.0] * SLOTS, []
    for arrival, service in zip(arrivals, services, strict=True):
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + service)
        delays.append(start - arrival)
    return np.array(delays)


def test_open_loop_above_capacity_shows_the_whole_queueing_delay(url, tmp_path):
    """Sent at 1.5 times what is served: each waits longer than the one before, as a queue says."""
    rate, count = 1.5 * CAPACITY, 120
    trace = tmp_path / "trace.jsonl"
    arrivals = list(itertools.islice(schedule("poisson", rate, seed=7), count))
    trace.write_text(
        "".join(json.dumps({"arrival": each, "prompt_tokens": 8, "answer_tokens": 8}) + "\n" for each in arrivals)
    )
    records = tmp_path / "records.jsonl"
    assert (
        locust(
            url,
            ["--arrival=constant", "--workload=trace", f"--trace={trace}", f"--records={records}", "--users=1", *ANY],
        )
        == 0
    )
    answers = read_answers([records])
    assert len(answers) == count
    intended = np.array([answer.intended for answer in answers]) - answers[0].intended + arrivals[0]
    assert np.allclose(intended, arrivals, atol=1e-3)
    waited = np.array([answer.ttft for answer in answers]) - FIRST
    # A busy machine makes each answer take a little more than it should: by the server's own account.
    busy = {each["id"]: each["busy"] for each in httpx.get(f"{url}/sent", timeout=60).json()}
    expected = queue_delays(arrivals, [busy[answer.id] for answer in answers])
    assert expected[-1] > 1.5
    assert waited[-20:].mean() == pytest.approx(expected[-20:].mean(), rel=0.1)
    assert np.corrcoef(waited, expected)[0, 1] > 0.99
    # A client that waits for its turn, and counts from when it sent, would have seen none of it.
    assert max(answer.sent - answer.intended for answer in answers) < 0.25


@pytest.mark.slow
def test_saturation_search_finds_the_knee_of_a_server(url):
    """Above its capacity the queue grows, and 0.2 s of delay are soon reached."""
    load = Load(scale=0.05, arrival="constant", warmup=1, duration=7)
    objective = Objective(ttft=FIRST + 0.2, itl=0.5)
    seeds = itertools.count()

    def holds(rate):
        return run(url, replace(load, rate=rate, seed=next(seeds)), objective).figures.held(objective)

    assert saturate(holds, CAPACITY * 0.8, tolerance=0.03, factor=1.4) == pytest.approx(CAPACITY, rel=0.05)


def test_over_saturation_is_given_up_early(url):
    load = Load(scale=0.05, warmup=0, duration=30)
    found = run(url, replace(load, rate=3 * CAPACITY), Objective(ttft=0.3, itl=0.5)).figures
    assert found.given_up
    assert found.seconds < 10


def test_a_run_begins_amidst_requests_and_is_cut_at_its_end(url):
    """Two of four slots are held by answers in their middle; all that is measured has begun at the end."""
    load = Load(scale=0.05, arrival="constant", warmup=1, duration=3, cut=True)
    start = time.time()
    found = run(url, replace(load, rate=5, text_seed=1, under_way=2), Objective(ttft=0.5, itl=0.5))
    assert time.time() - start < 60
    assert (found.figures.requests, found.figures.good, found.figures.errors) == (15, 1.0, {})
    amidst = [answer for answer in found.answers if "--" in answer.id]
    assert {answer.id for answer in amidst} == {"chat-1--1", "chat-1--2"}
    first = min(answer.intended for answer in found.answers if answer not in amidst)
    assert found.start - first == pytest.approx(1, abs=0.1)
    assert 0 <= first - max(answer.times[0] for answer in amidst) < 0.2
    assert max(answer.intended for answer in found.answers) == pytest.approx(found.start + 2.8, abs=0.05)


def test_a_run_leaves_no_queue_of_requests_it_begins_amidst(url):
    """Of more than the server has slots for, those that have not begun when a first token is due are ended."""
    load = Load(scale=0.05, arrival="constant", warmup=0, duration=1, cut=True)
    found = run(url, replace(load, rate=5, under_way=40), Objective(ttft=0.3, itl=0.5))
    amidst = [answer for answer in found.answers if "--" in answer.id]
    assert found.start - min(answer.intended for answer in amidst) == pytest.approx(0.3, abs=0.15)
    assert 4 <= sum(bool(answer.times) for answer in amidst) < 40
    assert (found.figures.requests, found.figures.good) == (5, 1.0)


def test_a_rate_above_capacity_does_not_hold_though_its_run_is_too_short_for_a_queue():
    """Four slots give 200 tokens a second: 21 answers, of which 10 a second are served and 32 are not.

    What is sent last has its time for a first token.
    """
    port = free_port()
    shape = ["--slots", "4", "--first", "0.02", "--gap", "0.02"]
    load = Load(scale=0.05, arrival="constant", warmup=0.5, duration=1.5, cut=True)
    objective = Objective(ttft=6, itl=0.5)  # later than any first token here: nothing but the tokens tells
    with running([sys.executable, "-m", "tests.token_server", str(port), *shape], port) as url:
        found = {rate: run(url, replace(load, rate=rate, under_way=2), objective).figures for rate in (10, 32)}
    assert {rate: (each.good, each.held(objective)) for rate, each in found.items()} == {
        10: (1.0, True),
        32: (1.0, False),
    }


def test_the_first_guess_counts_prompts_whose_answers_have_not_ended():
    """Four slots take a prompt each and hold it: four requests' prompts in two seconds, and a token of each answer."""
    port = free_port()
    shape = ["--slots", "4", "--first", "0.1", "--gap", "60", "--tokens", "6"]
    with running([sys.executable, "-m", "tests.token_server", str(port), *shape], port) as url:
        served, _ = warm_up(url, Load(workload="rag", warmup=0, duration=2))
    assert served == pytest.approx(4 / 2, rel=0.4)  # of the four prompts each has any length from 1,024 to 3,072


@pytest.mark.parametrize(
    ("seconds", "at_once", "guess"),
    [(0.0, 4, 3.0), (1.0, math.nan, 3.0), (1.0, 4, 3.0), (2.0, 4, 2.0), (8.0, 4, 0.5), (9.0, 4, 0.5)],
)
def test_the_first_guess_is_what_is_served_or_has_room(seconds, at_once, guess):
    """Three a second are served; a request takes those seconds. Five in ten seconds are a run's least."""
    load = Load(workload="rag", duration=10)
    asked = load.asks(texts=Texts())
    capacity = at_once * (asked.mean_tokens - asked.mean_answer / 2)
    assert first_guess(load, 3.0, seconds / asked.mean_answer, capacity) == pytest.approx(guess)


def test_a_server_that_does_not_answer_while_a_run_lasts_is_told_of():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"/v1/models was not answered .* longer --duration"):
            warm_up(url, Load(warmup=0, duration=1))


def test_the_cap_on_requests_in_flight_is_an_error_that_says_so(url, tmp_path):
    records = tmp_path / "records.jsonl"
    options = [
        "--arrival=constant",
        "--rate=40",
        "--duration=2",
        "--max-in-flight=3",
        f"--records={records}",
        "--client-bound=inf",
    ]
    assert locust(url, [*options, "--scale=0.05", "--users=1", *ANY]) == 1
    assert {answer.error for answer in read_answers([records])} - {CUT} == {None, "client at its cap"}


@pytest.mark.parametrize("knee", [0.07, 1.0, 37.0, 4321.0])
@pytest.mark.parametrize("start", [0.5, 3.0, 900.0])
def test_search_by_itself(knee, start):
    asked = []

    def holds(rate):
        asked.append(rate)
        return rate <= knee

    found = saturate(holds, start, tolerance=0.05)
    assert knee / 1.05 <= found <= knee
    assert found in asked


def test_a_search_that_finds_nothing_says_so():
    with pytest.raises(ValueError, match="held up to"):
        saturate(lambda rate: True, 1.0)
    with pytest.raises(ValueError, match="failed down to"):
        saturate(lambda rate: False, 1.0)


@pytest.mark.parametrize("kind", ["constant", "poisson", "bursts"])
def test_schedules_have_their_rate_and_their_seed(kind):
    def times(seed):
        return np.array(list(itertools.islice(schedule(kind, 5.0, seed, burst=4), 4000)))

    assert len(times(0)) / times(0)[-1] == pytest.approx(5.0, rel=0.1)
    assert np.array_equal(times(3), times(3))
    gaps = np.diff(times(0))
    assert (gaps >= 0).all()
    if kind == "constant":
        assert np.allclose(gaps, 0.2)
    elif kind == "poisson":
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
        assert not np.array_equal(times(0), times(1))
    else:
        assert (gaps == 0).mean() == pytest.approx(3 / 4, abs=0.01)


def test_schedules_refuse_nonsense():
    for given in (("poisson", 0.0), ("bursts", 1.0, 0, 0), ("closed", 1.0)):
        with pytest.raises(ValueError, match=r"rate|burst|arrival"):
            schedule(*given)
