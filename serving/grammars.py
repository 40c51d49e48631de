"""Grammars that allow no first character, as `root ::= root`: vLLM fails once it has taken one as a request's."""

from functools import cache
from http import HTTPStatus
from typing import Any

from serving.errors import Refused

LONGEST = 16_384
"""Characters of a grammar that is looked at, in some 20 ms; one of a megabyte would hold up all requests for 20 s."""


@cache
def _compiler() -> Any:
    """xgrammar's, for no vocabulary, which would take the most time; it would keep every grammar in its cache."""
    import xgrammar

    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([]), max_threads=1, cache_enabled=False)


def check_grammar(body: Any) -> None:
    """Raise Refused where an answer to `body` would have to follow a grammar that allows none."""
    asked = body.get("structured_outputs") if isinstance(body, dict) else None
    grammar = asked.get("grammar") if isinstance(asked, dict) else None
    if isinstance(grammar, str) and not allows_any(grammar):
        message = "the grammar refers to itself without end, so that no answer can follow it"
        raise Refused(HTTPStatus.BAD_REQUEST, "schema", message, "structured_outputs")


def allows_any(grammar: str) -> bool:
    """Whether a grammar in EBNF allows a first byte, or an empty answer; what is long, or none, is left to vLLM."""
    import xgrammar

    if len(grammar) > LONGEST:
        return True
    try:
        compiled = _compiler().compile_grammar(grammar)
    except RuntimeError:
        return True
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    return matcher.is_terminated() or any(matcher.accept_string(bytes([byte])) for byte in range(256))
