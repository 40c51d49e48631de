"""Tasks out of files: RULER's and LongBench's own, SQuAD's, CNN/DailyMail's, or anyone's JSON lines."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_ext.errors import UsageError
from vllm_ext.tasks.items import Item, Task, item
from vllm_ext.tasks.tasks import passages, summing_up


def read_task(path: Path, tokenizer: Any, count: int, seed: int = 0) -> Task:
    """A task out of a file of JSON lines, or SQuAD's own JSON; `count` items drawn with `seed`.

    A line is `{"prompt", "answer"}`, RULER's `{"input", "outputs"}`, LongBench's `{"input", "context", "answers"}`,
    SQuAD's `{"context", "question", "answers"}`, CNN/DailyMail's `{"article", "highlights"}`, or `{"text"}`. A task
    whose lines have a `length`, as RULER's and LongBench's do, is one that retrieves.

    Raises:
        UsageError: for a file that cannot be read so.

    """
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {path}: cannot be read ({error}); give another file") from error
    rows = _squad(content) or [_row(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line]
    if not rows:
        raise UsageError(f"--data {path}: it is empty; give a file with items")
    chosen = random.Random(seed)
    rows = chosen.sample(rows, len(rows))
    kinds = {tuple(sorted(row)) for row in rows}
    if len(kinds) > 1:
        raise UsageError(f"--data {path}: its lines are of several forms; give one form a file")
    source = path.name
    if "article" in rows[0]:
        return summing_up(path.stem, tokenizer, [(row["article"], row["highlights"]) for row in rows], count, source)
    if "text" in rows[0]:
        return passages(path.stem, tokenizer, [row["text"] for row in rows], count, chosen, source)
    items = tuple(_item(tokenizer, row["prompt"], row["answer"]) for row in rows[:count])
    if not all(each.prompt and each.answer for each in items):
        raise UsageError(f"--data {path}: a prompt or an answer in it is empty; mend it")
    length = max(len(each.prompt + each.answer) for each in items) if "length" in rows[0] else None
    return Task(path.stem, "answers", items, (), source, length)


def _item(tokenizer: Any, prompt: str, answer: str) -> Item:
    """With its depth, where its answer was told in these words."""
    told = prompt.rfind(answer.strip())
    return item(tokenizer, prompt, answer, told / len(prompt) if told >= 0 and answer.strip() else None)


def _squad(content: str) -> list[dict[str, str]]:
    """The rows of a file in SQuAD's own form; none if it has another."""
    try:
        articles = json.loads(content)["data"]
        return [
            _question(paragraph["context"], asked["question"], asked["answers"][0]["text"])
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
            if asked["answers"]
        ]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _row(path: Path, number: int, line: str) -> dict[str, str]:
    forms: Mapping[tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, str]]] = {
        ("prompt", "answer"): lambda row: {"prompt": row["prompt"], "answer": row["answer"]},
        ("input", "outputs"): lambda row: {
            "prompt": row["input"] + row.get("answer_prefix", ""),
            "answer": " " + ", ".join(row["outputs"]),
        },
        ("input", "context", "answers"): lambda row: _question(row["context"], row["input"], row["answers"][0]),
        ("context", "question", "answers"): lambda row: _question(
            row["context"], row["question"], row["answers"]["text"][0]
        ),
        ("article", "highlights"): lambda row: {"article": row["article"], "highlights": row["highlights"]},
        ("text",): lambda row: {"text": row["text"]},
    }
    try:
        row = json.loads(line)
        read = next(read for keys, read in forms.items() if row.keys() >= {*keys})
        return {name: str(value) for name, value in (read(row) | {k: row[k] for k in ("length",) if k in row}).items()}
    except (ValueError, AttributeError, StopIteration, LookupError, TypeError, RecursionError) as error:
        known = "; ".join(", ".join(keys) for keys in forms)
        raise UsageError(f"--data {path}: line {number} has none of the forms {known}; mend it") from error


def _question(context: str, question: str, answer: str) -> dict[str, str]:
    return {"prompt": f"{context}\nQ: {question}\nA:", "answer": f" {answer}\n"}
