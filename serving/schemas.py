"""JSON schemas that no answer can follow, since they refer to themselves with nothing in between.

From such a schema xgrammar makes a grammar that allows no token at all, and vLLM fails once it has taken one. Recursion
through an object or an array is no such thing.
"""

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from serving.errors import Refused

MAPS = ("properties", "patternProperties")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
PARTS = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")


def check_schemas(body: Any) -> None:
    """Raise Refused where an answer to `body` would have to follow an endless schema."""
    for param, schema in schemas(body):
        try:
            found = endless(schema)
        except RecursionError:
            continue  # which vLLM refuses itself
        if found is not None:
            message = f"the JSON schema's {found!r} refers to itself without end, so that no answer can follow it"
            raise Refused(HTTPStatus.BAD_REQUEST, "schema", message, param)


def schemas(body: Any) -> Iterator[tuple[str, Any]]:
    """The schemas that answers must follow, of whatever route, by the parameter that has them."""
    for name, *path in (
        ("structured_outputs", "json"),
        ("response_format", "json_schema", "schema"),
        ("text", "format", "schema"),
    ):
        yield name, _at(body, name, *path)
    choice = _at(body, "tool_choice")
    tools = _at(body, "tools")
    if choice not in (None, "none", "auto") and _at(choice, "type") not in ("none", "auto") and isinstance(tools, list):
        for tool in tools:
            yield "tools", _at(tool, "function", "parameters") or _at(tool, "parameters") or _at(tool, "input_schema")


def _at(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def endless(root: Any) -> str | None:
    """The reference in a schema, or in its text, that leads back to itself with nothing in between, if there is one."""
    if isinstance(root, str):
        try:
            root = json.loads(root)
        except ValueError:
            return None
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        if (found := _loop(root, node, frozenset())) is not None:
            return found
        waiting += _parts(root, node)
    return None


def _parts(root: Any, node: dict[str, Any]) -> Iterator[Any]:
    """What a schema is made of."""
    if isinstance(reference := node.get("$ref"), str):
        yield _resolved(root, reference)
        return
    for name in MAPS:
        if isinstance(each := node.get(name), dict):
            yield from each.values()
    for name in LISTS:
        if isinstance(each := node.get(name), list):
            yield from each
    for name in PARTS:
        yield node.get(name)


def _loop(root: Any, node: Any, passed: frozenset[str]) -> str | None:
    """The reference of `passed`, or of the node, that following nothing but references comes to again."""
    if not isinstance(node, dict):
        return None
    if isinstance(reference := node.get("$ref"), str):
        return reference if reference in passed else _loop(root, _resolved(root, reference), passed | {reference})
    if "const" in node or "enum" in node:
        return None
    for name in ("anyOf", "oneOf", "allOf"):
        choices = node.get(name)
        if isinstance(choices, list) and choices and (name != "allOf" or len(choices) == 1):
            found = [_loop(root, choice, passed) for choice in choices]
            return None if None in found else found[0]
    return None


def _resolved(root: Any, reference: str) -> Any:
    """What a reference of the form #/a/b is to, as xgrammar reads it; None where there is no such thing."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    return _at(root, *reference.split("/")[1:])
