"""Which JSON schemas no answer can follow, beside what xgrammar makes of them."""

import json
import random

import pytest
import xgrammar

from serving.errors import Refused
from serving.schemas import check_schemas, endless

A = {"$ref": "#/$defs/a"}
ENDLESS = [
    {"$ref": "#"},
    {"$defs": {"a": A}, **A},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": A}, **A},
    {"anyOf": [{"$ref": "#"}]},
    {"oneOf": [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}]},
    {"allOf": [{"$ref": "#"}]},
    {"type": "object", "$ref": "#"},
    {"type": "object", "properties": {"b": A}, "required": ["b"], "$defs": {"a": A}},
    {"type": "array", "items": A, "minItems": 1, "$defs": {"a": A}},
]
ANSWERED = [
    {},
    {"type": "string"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["a"]},
    {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
    {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
    {"type": "array", "items": {"$ref": "#"}},
    {"$defs": {"a": A}, "type": "integer"},
    {"const": 1, "anyOf": [{"$ref": "#"}]},
]
VOCABULARY = [chr(code) for code in range(32, 127)] + ["</s>"]


@pytest.fixture(scope="module")
def compiler():
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(VOCABULARY, stop_token_ids=[len(VOCABULARY) - 1]))


def comes_to_a_dead_end(compiler, schema: dict) -> bool:
    """Whether an answer of which every character is allowed can come to where none is."""
    grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
    bits = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    for seed in range(30):
        chosen, matcher = random.Random(seed), xgrammar.GrammarMatcher(grammar)
        for _ in range(60):
            matcher.fill_next_token_bitmask(bits)
            words = bits[0].tolist()
            allowed = [token for token in range(len(VOCABULARY)) if words[token // 32] >> token % 32 & 1]
            if not allowed:
                return True
            assert matcher.accept_token(chosen.choice(allowed))
            if matcher.is_terminated():
                break
    return False


@pytest.mark.parametrize("schema", [*ENDLESS, *ANSWERED], ids=json.dumps)
def test_is_endless_where_xgrammar_comes_to_a_dead_end(compiler, schema):
    assert (endless(schema) is not None) is comes_to_a_dead_end(compiler, schema) is (schema in ENDLESS)
    assert endless(json.dumps(schema)) == endless(schema)


@pytest.mark.parametrize(
    "schema",
    [
        *(None, True, "", "{", [], {"$ref": 3}, {"$ref": "#/nothing"}, {"$ref": "#a"}, {"$ref": "https://a.b"}),
        *({"anyOf": 3}, {"anyOf": []}, {"properties": [A]}, {"items": [A]}, {"$ref": "#/anyOf/0", "anyOf": [1]}),
    ],
)
def test_what_is_no_schema_is_left_to_vllm(schema):
    assert endless(schema) is None


def test_depth_is_left_to_vllm():
    schema: dict = {"type": "string"}
    for _ in range(5000):
        schema = {"anyOf": [schema]}
    check_schemas({"structured_outputs": {"json": schema}})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {"json": ENDLESS[0]}}, "structured_outputs"),
        ({"structured_outputs": {"json": json.dumps(ENDLESS[0])}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": ENDLESS[1]}}}, "response_format"),
        ({"text": {"format": {"type": "json_schema", "schema": ENDLESS[2]}}}, "text"),
        ({"tools": [{"function": {"parameters": ENDLESS[3]}}], "tool_choice": "required"}, "tools"),
        ({"tools": [{"parameters": ENDLESS[3]}], "tool_choice": {"type": "function", "name": "f"}}, "tools"),
        ({"tools": [{"input_schema": ENDLESS[3]}], "tool_choice": {"type": "any"}}, "tools"),
    ],
)
def test_finds_the_schema_of_every_route(body, param):
    with pytest.raises(Refused, match="refers to itself without end") as caught:
        check_schemas(body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("body", [None, [], {"tools": 3, "tool_choice": "required"}, {"structured_outputs": []}])
def test_finds_nothing_in_other_bodies(body):
    check_schemas(body)
    check_schemas({"tools": [{"function": {"parameters": ENDLESS[0]}}], "tool_choice": "auto"})
