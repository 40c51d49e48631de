"""Tasks whose answer was told once, anywhere in a long text: what a plan may not forget.

After RULER (arXiv 2404.06654): needles in a haystack, with one key, several keys or several values, that are numbers,
words or UUIDs; variables that name each other; examples to learn from that lie far back; and a fact in passing. The
haystack is the prose of `texts`, the search's and the judge's out of different articles, so no item is in both.

Needles are the same sentences as RULER's, and its values are right where each of their tokens is the first choice. To
search with, words and facts too are hidden four in a text, so that four items are read for the price of one.
"""

import math
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

from vllm_ext.tasks import texts
from vllm_ext.tasks.items import Item, Score, Split, Task, item

Name = Literal["needle", "needles", "values", "words", "uuids", "variables", "shots", "facts"]
NAMES: tuple[Name, ...] = get_args(Name)
LENGTHS = (512, 1_024, 2_048)
"""Tokens of a prompt and its answer."""
SHORTEST = 128
"""The fewest of them that anything can be hidden in."""
KEYS = 4
VALUES = 2
SPARE = 8
"""Tokens that a text of sentences may have beyond theirs."""
HOPS = 2
"""Variables that name another, after the one that is given the value."""
SHOTS = 4
SCORES: dict[Name, Score] = {"values": "tokens", "variables": "tokens", "shots": "tokens"}
"""Of tasks with answers of several parts; those of the others are right or not."""


@dataclass(frozen=True)
class Question:
    """What is asked at the end of a text."""

    question: str
    answer: str
    asked: int = 0
    """Which of the hidden is asked for."""


@dataclass(frozen=True)
class Puzzle:
    """What is hidden in the text, where, and what is asked at its end: one of the questions at a time."""

    hidden: tuple[str, ...]
    depths: tuple[float, ...]
    """Where each is hidden: 0 at the start of the text, 1 at its end."""
    questions: tuple[Question, ...]


def retrieval(name: Name, tokenizer: Any, length: int, count: int, seed: int = 0, split: Split = "judge") -> Task:
    """`count` items of up to `length` tokens, what they ask for at depths all over the text.

    What is hidden in one text is asked for in items next to each other, so that the text need be read only once.

    Raises:
        UsageError: where a package with texts is missing.

    """
    chosen = random.Random(f"{name} {length} {seed} {split}")
    sentences = _sentences(split)
    make: dict[Name, Callable[..., Puzzle]] = {
        "needle": lambda chosen, depth: _needle(chosen, "number", depth),
        "needles": lambda chosen, *depths: _needle(chosen, "number", *depths),
        "words": lambda chosen, *depths: _needle(chosen, "word", *depths),
        "uuids": lambda chosen, depth: _needle(chosen, "uuid", depth),
        "values": _values,
        "variables": _variables,
        "shots": _shots,
        "facts": _facts,
    }
    items: list[Item] = []
    asked = asked_of_a_text(name, split)
    puzzles = math.ceil(count / asked)
    for number in range(puzzles):
        # Each of them in a part of the text of its own, so that few puzzles ask all over it too.
        depths = [(part + (number + chosen.random()) / puzzles) / asked for part in chosen.sample(range(asked), asked)]
        puzzle = make[name](chosen, *depths)
        text = _text(tokenizer, puzzle, sentences, length, chosen)
        for each in puzzle.questions[: count - len(items)]:
            prompt = text + each.question
            depth = prompt.index(puzzle.hidden[each.asked]) / len(prompt)
            items.append(item(tokenizer, prompt, each.answer, depth))
    source = f"after RULER, in {texts.prose_source()}"
    return Task(
        f"{name} at {length}",
        SCORES.get(name, "answers"),
        tuple(items),
        (),
        source,
        length,
    )


def asked_of_a_text(name: Name, split: Split) -> int:
    """How many answers are hidden in one text, each asked for in an item of its own."""
    return KEYS if name == "needles" or (split == "search" and name in ("words", "facts")) else 1


def _text(tokenizer: Any, puzzle: Puzzle, sentences: Sequence[str], length: int, chosen: random.Random) -> str:
    """Up to `length` tokens with any of the questions and its answer."""
    asking = max((each.question + each.answer for each in puzzle.questions), key=lambda each: _tokens(tokenizer, each))
    room = length - _tokens(tokenizer, " ".join([*puzzle.hidden, asking])) - SPARE
    start = chosen.randrange(len(sentences))
    text: list[str] = []
    while room > 0:
        words = sentences[(start + len(text)) % len(sentences)].split(" ")
        while words and _tokens(tokenizer, " " + " ".join(words)) > room:
            del words[-max(1, len(words) // 8) :]
        room -= _tokens(tokenizer, " " + " ".join(words)) if words else room
        text.append(" ".join(words))
    positions = [round(depth * len(text)) for depth in puzzle.depths]
    for position, each in sorted(zip(positions, puzzle.hidden, strict=True), reverse=True):
        text.insert(position, each)
    return " ".join(text)


def _needle(chosen: random.Random, kind: Literal["number", "word", "uuid"], *depths: float) -> Puzzle:
    """A key with its value at each of the depths, and all of them asked for."""
    told = [(name, VALUE[kind](chosen)) for name in chosen.sample(_words(), len(depths))]
    return Puzzle(
        tuple(f"One of the special magic {kind}s for {name} is: {each}." for name, each in told),
        depths,
        tuple(
            Question(
                f"\nWhat is the special magic {kind} for {name} mentioned in the provided text? "
                f"The special magic {kind} for {name} mentioned in the provided text is:",
                f" {each}",
                number,
            )
            for number, (name, each) in enumerate(told)
        ),
    )


def _values(chosen: random.Random, depth: float) -> Puzzle:
    """All of the values of one key, in the order they are told in."""
    name = chosen.choice(_words())
    depths = sorted([depth, *(chosen.random() for _ in range(VALUES - 1))])
    told = [_number(chosen) for _ in depths]
    return Puzzle(
        tuple(f"One of the special magic numbers for {name} is: {each}." for each in told),
        tuple(depths),
        (
            Question(
                f"\nWhat are all the special magic numbers for {name} mentioned in the provided text? "
                f"The special magic numbers for {name} mentioned in the provided text are:",
                " " + ", ".join(told),
                depths.index(depth),
            ),
        ),
    )


def _variables(chosen: random.Random, depth: float) -> Puzzle:
    """A value, and variables that are given it through one another."""
    names = chosen.sample([a + b + c for a in "BCDFGH" for b in "JKLMNP" for c in "QRSTVW"], HOPS + 1)
    value = f"{chosen.randrange(10_000, 100_000)}"
    depths = sorted([depth, *(chosen.random() for _ in range(HOPS))])
    told = [f"VAR {names[0]} = {value}."]
    told += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
    return Puzzle(
        tuple(told),
        tuple(depths),
        (
            Question(
                f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
                f"According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
                f"assigned the value {value}, they are:",
                " " + ", ".join(names),
                depths.index(depth),
            ),
        ),
    )


def _shots(chosen: random.Random, depth: float) -> Puzzle:
    """A question whose answer is to look as those of the examples do, which lie together."""
    known = chosen.sample(list(texts.capitals().items()), SHOTS + 1)
    lines = [f"{texts.capital_question(country)} It is {city}." for country, city in known]
    question, answer = lines[-1].split(" It is ")
    shown = "\n" + "\n".join(lines[:-1]) + "\n"
    return Puzzle((shown,), (depth,), (Question(f"\n{question}", f" It is {answer}"),))


def _facts(chosen: random.Random, *depths: float) -> Puzzle:
    """Where people were said to be, each in one sentence among others."""
    names = chosen.sample(PEOPLE, len(depths))
    told = list(zip(names, chosen.sample(list(texts.capitals().values()), len(depths)), strict=True))
    return Puzzle(
        tuple(f"{name} keeps a shop in {town}." for name, town in told),
        depths,
        tuple(
            Question(
                f"\nQuestion: In which city does {name} keep a shop?\nAnswer: {name} keeps a shop in",
                f" {town}",
                number,
            )
            for number, (name, town) in enumerate(told)
        ),
    )


PEOPLE = (
    "Agatha",
    "Bertram",
    "Clarissa",
    "Desmond",
    "Edwina",
    "Ferdinand",
    "Griselda",
    "Horatio",
    "Isadora",
    "Leopold",
)


def _number(chosen: random.Random) -> str:
    return f"{chosen.randrange(1_000_000, 10_000_000)}"


def _word(chosen: random.Random) -> str:
    return "-".join(chosen.sample(_words(), 2))


def _uuid(chosen: random.Random) -> str:
    return str(uuid.UUID(int=chosen.getrandbits(128), version=4))


VALUE = {"number": _number, "word": _word, "uuid": _uuid}


@cache
def _words() -> tuple[str, ...]:
    """Lower-case words of the prose, each of 6 to 9 letters: rare enough to be told once, and no names."""
    found = re.findall(r"(?<=[a-z] )[a-z]{6,9}(?=[ ,.])", " ".join(texts.prose("calibration")))
    return tuple(sorted(set(found)))


@cache
def _sentences(split: Split) -> tuple[str, ...]:
    """Of all articles of the split."""
    articles = texts.prose("held_out" if split == "judge" else "calibration")
    return tuple(each for article in articles for each in re.split(r"(?<=[.!?])\s+", article) if each)


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)
