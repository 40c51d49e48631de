"""Passages of one length, in tokens, out of text that is given: what layers and heads are fitted to."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from vllm_ext.errors import UsageError


def read_texts(path: Path) -> list[str]:
    """The text of a file, or of every `.txt` and `.jsonl` below a folder; of a `.jsonl`, each line's `text`.

    Raises:
        UsageError: where there is none, or it cannot be read.

    """
    path = path.expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
        if not files:
            raise UsageError(f"--text {path}: no .txt or .jsonl in that folder; give other text")
    else:
        files = [path]
    texts: list[str] = []
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--text {file}: cannot be read ({error}); give other text") from error
        texts += [content] if file.suffix != ".jsonl" else _json_lines(file, content)
    return texts


def _json_lines(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.strip().split("\n"), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f'--text {file}: line {number} is no JSON object with "text"; mend it') from error
        yield str(text)


def cut(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int, length: int, seed: int
) -> torch.Tensor:
    """`[tokens // length, length]`: passages that do not overlap, from all over the texts, the same for the same seed.

    Each begins with the token that the tokenizer begins every text with, where it has one.

    Raises:
        UsageError: where the texts, or those of them that are long enough, hold fewer.

    """
    if tokens < length:
        raise UsageError(f"--tokens {tokens} is less than one passage of {length}; raise it, or lower --length")
    chosen = random.Random(seed)
    found = all_passages(tokenizer, texts, length, chosen)
    if len(found) < tokens // length:
        raise UsageError(
            f"the text has {len(found)} passages of {length} tokens, fewer than the {tokens // length} of "
            f"--tokens {tokens}; give more text, or lower --tokens or --length"
        )
    return torch.tensor(chosen.sample(found, tokens // length))


def all_passages(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, chosen: random.Random | None = None
) -> list[list[int]]:
    """Every passage of `length` tokens that does not overlap another, in the texts' order.

    Each begins with the token that the tokenizer begins every text with, where it has one. `chosen` has a text's first
    passage begin anywhere in it, instead of with it.
    """
    first = tokenizer("").input_ids[:1]
    first = first if first == [tokenizer.bos_token_id] else []
    size = length - len(first)
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        spare = len(ids) - size
        if spare >= 0:
            start = 0 if chosen is None else chosen.randint(0, min(spare, size))
            found += [first + ids[at : at + size] for at in range(start, spare + 1, size)]
    return found
