"""The character vocabulary: how each of a tokenizer's tokens is spelled, byte by byte, in k places.

In *SpeLLM* (arXiv 2507.16323) k small heads each predict one character of the next token in place of the projection to
the whole vocabulary. Here a character is a byte. A token of fewer than k bytes ends with END; a longer one is spelled
by its first k bytes. A token without bytes, as special ones, is a symbol of its own in the first place, and so is one
that would be spelled as another already is: the lowest id, or what is no longer than k bytes, has the spelling. So
every token has one spelling, and every spelling is one token's.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) and SentencePiece (Llama 2, Mistral, Gemma) are read, through the decoder
that a fast tokenizer carries.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from transformers.convert_slow_tokenizer import bytes_to_unicode

from vllm_ext.errors import UsageError

BYTES = 256
END = BYTES
"""The symbol after a token's last byte."""
OWN = BYTES + 1
"""The first of the symbols that stand for a token by themselves."""
POSITIONS = 16

Reason = Literal["special", "unused", "same bytes", "same beginning"]
"""Why a token is a symbol of its own: it stands for no text; no token has that id; another token is spelled so; another
token begins with the same k bytes."""
SPACE = "▁"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class CharacterVocabulary:
    """The spelling of every token id."""

    positions: int
    """k: how many places there are."""
    spellings: tuple[tuple[int, ...], ...]
    """Symbols by token id: bytes, and END where there is room for it; or one symbol from `OWN` on."""
    own: Mapping[int, Reason]
    """Tokens that are symbols of their own, in the order of their symbols, and why."""
    cut: tuple[int, ...]
    """Tokens of more than k bytes that are spelled by their first k."""

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int, positions: int = POSITIONS) -> Self:
        """Of a fast tokenizer, for a model with `vocab_size` rows of logits.

        Raises:
            UsageError: for a tokenizer that does not tell its tokens' bytes, or no positions.

        """
        if positions < 1:
            raise UsageError(f"--positions {positions}: choose 1 or more")
        text = token_bytes(tokenizer)
        known = {each for each in range(vocab_size) if text.get(each)}
        own: dict[int, Reason] = {}
        taken: dict[tuple[int, ...], int] = {}
        # Those that fit come first: of two that begin alike, the shorter one is spelled.
        for token in sorted(known, key=lambda each: (len(text[each]) > positions, each)):
            spelling = spelled(text[token], positions)
            if spelling in taken:
                own[token] = "same bytes" if text[taken[spelling]] == text[token] else "same beginning"
            else:
                taken[spelling] = token
        for token in range(vocab_size):
            if token not in known:
                own[token] = "special" if token in text else "unused"
        own = dict(sorted(own.items()))
        symbols = {token: (OWN + number,) for number, token in enumerate(own)}
        spellings = tuple(symbols.get(each) or spelled(text[each], positions) for each in range(vocab_size))
        cut = tuple(token for token in sorted(known - own.keys()) if len(text[token]) > positions)
        return cls(positions, spellings, own, cut)

    @property
    def symbols(self) -> int:
        """How many symbols there are: bytes, END, and tokens of their own."""
        return OWN + len(self.own)

    def coverage(self, tokens: Sequence[int]) -> float:
        """The part of a text's tokens that are spelled to their end."""
        others = self.own.keys() | set(self.cut)
        return sum(token not in others for token in tokens) / len(tokens)


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token stands for; none for special tokens.

    Raises:
        UsageError: for a tokenizer of another kind.

    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = list(_steps(state["decoder"]))
    names = {step["type"] for step in steps}
    if "ByteLevel" in names:
        read = _byte_level
    elif "Metaspace" in names or any(step.get("pattern") == {"String": SPACE} for step in steps):
        read = _sentence_piece
    else:
        raise UsageError(
            f"tokenizer {type(tokenizer).__name__}: its decoder ({', '.join(sorted(names)) or 'none'}) does not tell "
            "the tokens' bytes; byte-level BPE and SentencePiece tokenizers do"
        )
    added = {each["id"]: each for each in state["added_tokens"]}
    found: dict[int, bytes] = {}
    for piece, token in tokenizer.get_vocab().items():
        if token not in added:
            found[token] = read(piece)
        else:
            found[token] = b"" if added[token]["special"] else added[token]["content"].encode()
    return found


def _steps(decoder: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    """The steps of a decoder, whether it is a sequence of them or not."""
    if decoder is None:
        return ()
    return decoder["decoders"] if decoder["type"] == "Sequence" else (decoder,)


_STAND_INS = {letter: byte for byte, letter in bytes_to_unicode().items()}


def _byte_level(piece: str) -> bytes:
    return bytes(_STAND_INS[letter] for letter in piece)


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def spelled(text: bytes, positions: int) -> tuple[int, ...]:
    """The symbols of some bytes: the first `positions` of them, or all and END."""
    return (*text[:positions], END) if len(text) < positions else tuple(text[:positions])
