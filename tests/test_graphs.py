"""Graphs on a CPU behave as CUDA's: they know addresses, not tensors, and share their memory."""

import pytest
import torch

from tests.graphs import Graph, at, capture, forget


@pytest.fixture(autouse=True)
def nothing_known():
    forget()


def captured(function, *given):
    graph = Graph()
    with capture(graph):
        made = function(*given)
    return graph, made


def test_a_replay_computes_from_what_lies_there_now():
    given, kept = torch.ones(3), torch.zeros(3)

    def work(states):
        kept.add_(1)
        return (states[1:] * 2).cumsum(0)

    graph, made = captured(work, given)
    given.copy_(torch.tensor([7.0, 1.0, 2.0]))
    graph.replay()
    assert made.tolist() == [2.0, 6.0]
    assert kept.tolist() == [2.0] * 3


def test_nothing_of_python_runs_again():
    scale = [2.0]
    given = torch.ones(3)
    graph, made = captured(lambda states: states * scale[0], given)
    scale[0] = 5.0
    graph.replay()
    assert made.tolist() == [2.0] * 3


@pytest.mark.parametrize("holds", [True, False])
def test_what_nobody_held_is_given_to_the_next_graph(holds):
    given = torch.ones(3)
    first, between = captured(lambda states: states + 1, given)
    handed = between if holds else at(between)
    if not holds:
        del between
    second, made = captured(lambda states: states * 2, handed)
    first.replay()
    second.replay()
    assert made.isnan().all().item() is not holds


def test_a_replay_overwrites_what_a_later_graph_left():
    given = torch.ones(3)
    first, _ = captured(lambda states: states + 1, given)
    second, made = captured(lambda states: states * 2, given)
    second.replay()
    assert made.tolist() == [2.0] * 3
    first.replay()
    assert made.isnan().all()


def test_memory_from_outside_is_held_for_good():
    given = torch.ones(3)
    graph, _ = captured(lambda states: states + 1, given)
    del given
    with pytest.raises(RuntimeError, match="given back"):
        graph.replay()


@pytest.mark.parametrize("work", [lambda each: each.sum().item(), torch.nonzero, lambda each: each[each > 0]])
def test_a_capture_waits_for_nothing(work):
    with pytest.raises(RuntimeError, match="waits for the GPU"):
        captured(work, torch.ones(3))
    assert Graph.capturing is None
