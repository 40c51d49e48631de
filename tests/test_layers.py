import pytest

from model_executors.attention_plan import AttentionPlan, LayerPlan
from vllm_ext.errors import UsageError
from vllm_ext.layers import (
    changes_of,
    format_layers,
    format_options,
    format_plan,
    layer_plans,
    parse_layers,
    parse_windows,
)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", [0]), ("25-29", [25, 26, 27, 28, 29]), ("7-7", [7]), ("9,3,5-6", [3, 5, 6, 9]), (" 1 , 2-3 ", [1, 2, 3])],
)
def test_reads_lists_and_ranges(text, layers):
    assert parse_layers(text) == layers


def test_none_is_no_layer():
    assert parse_layers("none") == []
    assert parse_windows("none") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no layer or range"),
        ("3,", "'' is no layer or range"),
        ("top", "'top' is no layer or range"),
        ("-1", "'-1' is no layer or range"),
        ("5-3", "runs backwards; write 3-5"),
        ("1-4,3", "layer 3 is named twice"),
        ("1-4:128", "layer 1 cannot have a window here; leave out :128"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(UsageError, match=message):
        parse_layers(text)


def test_reads_windows():
    large, small = (128, None), (64, 8)
    assert parse_windows("25-26:64+8, 3:128,15-16:128") == {3: large, 15: large, 16: large, 25: small, 26: small}
    assert parse_windows("3,15-16:128,25-26:64+8") == parse_windows("25-26:64+8,3,15-16:128")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "layer 3 has no window; write it as 3:128"),
        ("3:64,5", "layer 5 has no window"),
        ("3:64+", "'3:64\\+' is no layer or range"),
        ("3:", "'3:' is no layer or range"),
        ("3:-1", "'3:-1' is no layer or range"),
        ("3:64,1-4:128", "layer 3 is named twice"),
    ],
)
def test_refuses_windows(text, message):
    with pytest.raises(UsageError, match=message):
        parse_windows(text)


def test_options_name_every_kind():
    assert layer_plans(skip="4-5", window="1:16", freeze="2,3:32", consolidation="linear", rank=8) == {
        1: LayerPlan("window", window=16),
        2: LayerPlan("freeze"),
        3: LayerPlan("freeze", window=32),
        4: LayerPlan("skip", consolidation="linear", rank=8),
        5: LayerPlan("skip", consolidation="linear", rank=8),
    }
    assert layer_plans() == layer_plans(skip="none") == {}


def test_a_frozen_layer_may_be_given_its_window_in_either_option():
    assert layer_plans(freeze="2-3", window="3:32") == layer_plans(freeze="2,3:32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "3-5", "window": "5:16"}, "layer 5 is in --skip and in --window; name it in one of them"),
        ({"skip": "3-5", "freeze": "5"}, "layer 5 is in --skip and in --freeze; name it in one of them"),
        ({"window": "5:16", "freeze": "5:32"}, "layer 5 has window 32 in --freeze and window 16 in --window"),
        ({"window": "5:0"}, "window is 0; it must be a positive whole number"),
        ({"window": "5:16", "freeze": "4:0"}, "window is 0; it must be a positive whole number"),
        ({"window": "5:16", "consolidation": "bias"}, "--consolidation bias: .* give --skip too"),
        ({"freeze": "5", "rank": 8}, "--rank 8: .* give --skip too"),
        ({"skip": "5", "rank": 8}, "rank is 8 with consolidation none; only linear has a rank"),
        ({"skip": "5", "consolidation": "cubic"}, "consolidation is 'cubic'; use one of none, bias, linear"),
    ],
)
def test_refuses_options_that_exclude_each_other(options, message):
    with pytest.raises(UsageError, match=message):
        layer_plans(**options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {3: LayerPlan("skip")},
        {
            0: LayerPlan("window", 128),
            1: LayerPlan("window", 128),
            4: LayerPlan("window", 64),
            5: LayerPlan("window", 64, 8),
        },
        {1: LayerPlan("window", 8), 3: LayerPlan("freeze"), 4: LayerPlan("freeze", 32, 16), 5: LayerPlan("freeze", 32)},
        {4: LayerPlan("skip", consolidation="linear", rank=8), 1: LayerPlan("window", 64)},
    ],
    ids=format_plan,
)
def test_a_plan_that_is_written_out_is_read_back(changes):
    words = iter(format_options(changes).split())
    options = {name.removeprefix("--"): value for name, value in zip(words, words, strict=True)}
    if "rank" in options:
        options["rank"] = int(options["rank"])
    assert layer_plans(**options) == changes
    assert changes_of(AttentionPlan.of(6, changes)) == changes


def test_plans_in_a_few_words():
    windows = dict.fromkeys([0, 1, 2, 9], LayerPlan("window", 128)) | {4: LayerPlan("window", 256, 8)}
    assert format_plan(windows | {28: LayerPlan("skip")}) == "skip 28, window 0-2,9:128,4:256+8"
    assert format_plan({}) == "stock"
    assert format_layers([]) == "none"
