import pytest

from model_executors.attention_plan import LayerPlan
from vllm_ext.errors import UsageError
from vllm_ext.layers import layer_plans, parse_layers, parse_windows


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
    assert parse_windows("25-26:64, 3:128,15-16:128") == {3: 128, 15: 128, 16: 128, 25: 64, 26: 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "layer 3 has no window; write it as 3:128"),
        ("3:64,5", "layer 5 has no window"),
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
