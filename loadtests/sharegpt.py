"""A dataset of ShareGPT's form: a JSON list of `{"conversations": [{"from": "human", "value": "…"}, …]}`.

So are ShareGPT_V3_unfiltered_cleaned_split.json, which `vllm bench serve` reads, and many others.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USERS, ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True)
class Dialogue:
    """What was said, and what was answered."""

    turns: tuple[tuple[str, str], ...]


def read_dialogues(file: Path) -> tuple[Dialogue, ...]:
    """All that begin with a user's words which were answered; each as far as both take turns.

    Raises:
        ValueError: where the file is none of that form.

    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"dataset {file}: {error.strerror}; name a file of ShareGPT's form") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"dataset {file.name}: no JSON ({error}); give a file of ShareGPT's form") from error
    try:
        found = [Dialogue(turns) for row in rows if (turns := _turns(row["conversations"]))]
    except (TypeError, KeyError, AttributeError) as error:
        wanted = '[{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}]'
        raise ValueError(f"dataset {file.name}: it is not {wanted}") from error
    if not found:
        raise ValueError(f"dataset {file.name}: nothing in it was said and answered; give another file")
    return tuple(found)


def _turns(said: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    turns = []
    for ours, theirs in zip(said[::2], said[1::2], strict=False):
        texts = ours["value"], theirs["value"]
        if ours["from"] not in USERS or theirs["from"] not in ANSWERS or not all(text.strip() for text in texts):
            break
        turns.append(texts)
    return tuple(turns)
