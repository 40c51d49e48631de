import pytest

from model_executors.attention_plan import AttentionPlan


def test_names_the_kind_of_every_layer():
    plan = AttentionPlan.skipping([1, 4, 5], num_layers=6)
    assert plan.kinds == ("full", "skip", "full", "full", "skip", "skip")
    assert plan.attending == [0, 2, 3]
    assert plan.skipped == [1, 4, 5]


@pytest.mark.parametrize(
    ("skip", "start"), [([], 4), ([3], 3), ([2, 3], 2), ([1, 2], 4), ([1, 2, 3], 1), ([0, 3], 3)], ids=str
)
def test_the_tail_starts_above_the_last_layer_that_attends(skip, start):
    plan = AttentionPlan.skipping(skip, num_layers=4)
    assert plan.tail_start == start
    assert plan.has_tail == (start < 4)


def test_survives_the_configuration():
    plan = AttentionPlan.skipping([2, 3], num_layers=4)
    assert AttentionPlan.from_config(plan.to_config(), 4) == plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan.skipping([4], 4), "layer 4 does not exist; the model has layers 0-3"),
        (lambda: AttentionPlan.skipping(range(4), 4), "skips all 4 layers"),
        (lambda: AttentionPlan(()), "skips all 0 layers"),
        (lambda: AttentionPlan(("full", "lazy")), r"attention_plan\[1\] is 'lazy'; use one of full, skip"),
        (lambda: AttentionPlan.from_config({"attention_plan": ["full"]}, 2), "for 1 layers but the model has 2"),
        (lambda: AttentionPlan.from_config({}, 2), "attention_plan is None"),
        (lambda: AttentionPlan.from_config(None, 2), "attention_plan is None"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
