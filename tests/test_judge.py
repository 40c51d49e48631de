"""Which plan is taken."""

import pytest

from model_executors.attention_plan import LayerPlan
from vllm_ext.errors import UsageError
from vllm_ext.planner.judge import Goal, Judged
from vllm_ext.reports.figures import Figure


def judged(saved, kept, worst, prefill=0.0):
    tasks = {"a": Figure(0.5, 10, 2 * kept - worst), "b": Figure(0.5, 10, worst), "c": Figure(0.0, 10)}
    return Judged({1: LayerPlan("window", 8)}, saved, prefill, tasks, kept)


def test_a_task_may_lose_twice_as_much_as_the_mean():
    assert judged(0.1, 0.99, 0.99).loss == pytest.approx(0.01)
    assert judged(0.1, 0.99, 0.94).loss == pytest.approx(0.03)
    assert judged(0.1, 1.02, 1.01).loss < 0


def test_what_a_task_loses_counts_as_far_as_its_items_can_tell():
    tasks = {"a": Figure(0.5, 10, 0.8, (0.7, 0.97)), "b": Figure(0.5, 10, 1.2, (1.0, 1.4))}
    assert Judged({}, 0.5, 0.0, tasks, 1.0).loss == pytest.approx(0.015)
    assert Judged({}, 0.5, 0.0, tasks, 0.9).loss == pytest.approx(0.1)


FRONT = [
    judged(0.3, 1.0, 0.99),
    judged(0.4, 0.99, 0.97),
    judged(0.4, 0.985, 0.97, prefill=0.2),
    judged(0.5, 0.985, 0.90),
    judged(0.6, 0.93, 0.9),
]


@pytest.mark.parametrize(
    ("goal", "taken"),
    [
        (Goal(max_loss=0.02), 2),
        (Goal(max_loss=0.05), 3),
        (Goal(max_loss=0.008), 0),
        (Goal(kv_saving=0.4), 2),  # both lose as much, but this one saves prompt work too
        (Goal(kv_saving=0.5), 3),
        (Goal(kv_saving=0.0), 0),
        (Goal(max_loss=0.1, kv_saving=0.55), 4),
    ],
)
def test_takes(goal, taken):
    assert goal.choose(FRONT) is FRONT[taken]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal(kv_saving=0.7), r"--kv-saving 0.7: the plans found save up to 0.60; ask for less"),
        (Goal(max_loss=0.001), r"--max-loss 0.001: the plans found that save enough lose at least 0.005"),
        (Goal(max_loss=0.02, kv_saving=0.45), r"--max-loss 0.02: the plans found that save enough lose at least 0.050"),
    ],
)
def test_refuses_what_no_plan_reaches(goal, message):
    with pytest.raises(UsageError, match=message):
        goal.choose(FRONT)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"max_loss": 1.0}, "--max-loss 1.0: it is a part of all"),
        ({"kv_saving": -0.1}, "--kv-saving -0.1: it is a part of all"),
        ({}, "no goal; give --max-loss, --kv-saving or both"),
    ],
)
def test_refuses_goals(parts, message):
    with pytest.raises(UsageError, match=message):
        Goal(**parts)
