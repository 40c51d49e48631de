"""Which grammars no answer can follow."""

import pytest

from serving.errors import Refused
from serving.grammars import LONGEST, allows_any, check_grammar


@pytest.mark.parametrize("grammar", ["root ::= root", 'root ::= root "a"', "root ::= a\na ::= b\nb ::= a"])
def test_refuses_what_allows_nothing(grammar):
    with pytest.raises(Refused, match="refers to itself without end") as caught:
        check_grammar({"structured_outputs": {"grammar": grammar}})
    assert (caught.value.status, caught.value.param) == (400, "structured_outputs")


@pytest.mark.parametrize(
    "grammar", ['root ::= "a"', 'root ::= ""', 'root ::= root | "a"', 'root ::= "a" root', "root ::= (", 'start: "a"']
)
def test_leaves_others_to_vllm(grammar):
    assert allows_any(grammar)


def test_what_would_take_long_is_left_to_vllm():
    assert allows_any("root ::= root\n" + "# more\n" * LONGEST)


@pytest.mark.parametrize("body", [None, [], {}, {"structured_outputs": 3}, {"structured_outputs": {"grammar": 3}}])
def test_finds_nothing_in_other_bodies(body):
    check_grammar(body)
