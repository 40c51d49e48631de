"""Grammars that allow no first character, as `root ::= root`: vLLM fails once it has taken one as a request's."""

from functools import cache
from http import HTTPStatus
from typing import Any

from serving.errors import Refused

END = 256


@cache
def _compiler() -> Any:
    """xgrammar's, for a vocabulary of single bytes."""
    import xgrammar

    vocabulary = [bytes([each]) for each in range(END)] + [b"</s>"]
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[END]), max_threads=1)


def check_grammar(body: Any) -> None:
    """Raise Refused where an answer to `body` would have to follow a grammar that allows none."""
    asked = body.get("structured_outputs") if isinstance(body, dict) else None
    grammar = asked.get("grammar") if isinstance(asked, dict) else None
    if isinstance(grammar, str) and not allows_any(grammar):
        message = "the grammar refers to itself without end, so that no answer can follow it"
        raise Refused(HTTPStatus.BAD_REQUEST, "schema", message, "structured_outputs")


def allows_any(grammar: str) -> bool:
    """Whether a grammar in EBNF allows a first character, or an empty answer; what is no grammar is left to vLLM."""
    import xgrammar

    try:
        matcher = xgrammar.GrammarMatcher(_compiler().compile_grammar(grammar))
    except RuntimeError:
        return True
    allowed = xgrammar.allocate_token_bitmask(1, END + 1)
    matcher.fill_next_token_bitmask(allowed)
    return bool(allowed.any())
