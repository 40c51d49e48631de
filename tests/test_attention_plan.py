import pytest

from model_executors.attention_plan import FULL, AttentionPlan, LayerPlan

SKIP = LayerPlan("skip")
FREEZE = LayerPlan("freeze")


def skipping(layers, num_layers=4):
    return AttentionPlan.of(num_layers, dict.fromkeys(layers, SKIP))


def test_says_which_layers_are_of_which_kind():
    window, linear = LayerPlan("window", window=16), LayerPlan("skip", consolidation="linear")
    plan = AttentionPlan.of(6, {1: window, 3: FREEZE, 4: SKIP, 5: linear})
    assert plan.layers == (FULL, window, FULL, FREEZE, SKIP, linear)
    assert plan.attending == [0, 1, 2, 3]
    assert plan.skipped == [4, 5]
    assert plan.fitted == [5]
    assert plan.windowed == [1]
    assert plan.first_frozen == 3
    assert skipping([3]).first_frozen == 4


@pytest.mark.parametrize(
    ("skip", "start"), [([], 4), ([3], 3), ([2, 3], 2), ([1, 2], 4), ([1, 2, 3], 1), ([0, 3], 3)], ids=str
)
def test_the_tail_starts_above_the_last_layer_that_attends(skip, start):
    plan = skipping(skip)
    assert plan.tail_start == start
    assert plan.has_tail == (start < 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {2: SKIP, 3: LayerPlan("skip", consolidation="linear", rank=8)},
        {1: LayerPlan("window", window=16), 2: LayerPlan("freeze", window=32), 3: FREEZE},
    ],
)
def test_survives_the_configuration(changes):
    plan = AttentionPlan.of(4, changes)
    assert AttentionPlan.from_config(plan.to_config(), 4) == plan


def test_the_configuration_says_no_more_than_it_must():
    plan = AttentionPlan.of(4, {1: LayerPlan("window", window=16), 2: LayerPlan("window", window=16, sink=8), 3: SKIP})
    other = {"kind": "window", "window": 16, "sink": 8}
    assert plan.to_config() == {"attention_plan": ["full", other | {"sink": 4}, other, "skip"]}
    assert plan.layers[1].sink == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lazy"}, "kind is 'lazy'; use one of full, window, freeze, skip"),
        ({"kind": "window"}, "a window layer has no window"),
        ({"kind": "full", "window": 16, "sink": 4}, "a full layer has window 16"),
        ({"kind": "full", "sink": 4}, "a full layer has sink 4 and no window"),
        ({"kind": "window", "window": 16, "sink": 0}, "sink is 0; it must be a positive whole number"),
        ({"kind": "window", "window": 16, "sink": 17}, "sink is 17; a block of the KV cache holds it"),
        ({"kind": "window", "window": 0, "sink": 4}, "window is 0; it must be a positive whole number"),
        ({"kind": "window", "window": 16.0, "sink": 4}, "window is 16.0; it must be a positive whole number"),
        ({"kind": "window", "window": True, "sink": 4}, "window is True; it must be a positive whole number"),
        ({"kind": "skip", "consolidation": "cubic"}, "consolidation is 'cubic'; use one of none, bias, linear"),
        ({"kind": "full", "consolidation": "bias"}, "a full layer has consolidation bias"),
        ({"kind": "skip", "consolidation": "bias", "rank": 8}, "rank is 8 with consolidation bias"),
        ({"kind": "skip", "consolidation": "linear", "rank": 0}, "rank is 0; it must be a positive whole number"),
    ],
)
def test_refuses_a_layer(settings, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: skipping([4]), "layer 4 does not exist; the model has layers 0-3"),
        (lambda: skipping([-1]), "layer -1 does not exist; the model has layers 0-3"),
        (lambda: skipping(range(4)), "skips all 4 layers"),
        (lambda: AttentionPlan(()), "skips all 0 layers"),
        (lambda: AttentionPlan.of(4, {0: FREEZE}), "freezes layer 0"),
        (lambda: AttentionPlan.of(4, {1: FREEZE, 3: SKIP}), "layer 2 is full above layer 1, which is frozen"),
        (lambda: AttentionPlan.from_config({"attention_plan": ["full"]}, 2), "for 1 layers but the model has 2"),
        (lambda: AttentionPlan.from_config({"attention_plan": ["full", "lazy"]}, 2), r"attention_plan\[1\]: kind is"),
        (lambda: AttentionPlan.from_config({"attention_plan": ["full", 3]}, 2), r"attention_plan\[1\]: 3 is no layer"),
        (lambda: AttentionPlan.from_config({"attention_plan": [{"sort": "full"}]}, 1), "is no layer's plan"),
        (lambda: AttentionPlan.from_config({}, 2), "attention_plan is None"),
        (lambda: AttentionPlan.from_config(None, 2), "attention_plan is None"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
