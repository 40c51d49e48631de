import pytest

from vllm_ext.errors import UsageError
from vllm_ext.layers import parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", [0]), ("25-29", [25, 26, 27, 28, 29]), ("7-7", [7]), ("9,3,5-6", [3, 5, 6, 9]), (" 1 , 2-3 ", [1, 2, 3])],
)
def test_reads_lists_and_ranges(text, layers):
    assert parse_layers(text) == layers


def test_none_is_no_layer():
    assert parse_layers("none") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no layer or range"),
        ("3,", "'' is no layer or range"),
        ("top", "'top' is no layer or range"),
        ("-1", "'-1' is no layer or range"),
        ("5-3", "runs backwards; write 3-5"),
        ("1-4,3", "layer 3 is named twice"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(UsageError, match=message):
        parse_layers(text)
