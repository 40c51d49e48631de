"""What a model is asked: items of a prompt and its answer, and tasks of items that are scored alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

Score = Literal["answers", "tokens", "summaries"]
"""Answered right or not; the part of the tokens that is the first choice; ROUGE-L of what is written."""
Split = Literal["search", "judge"]
"""A planner judges on other items than it searched with."""


@dataclass(frozen=True)
class Item:
    """A prompt, and what is to follow it, in token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float | None = None
    """Where in the prompt the answer was told, from 0, its start, to 1, its end; None where it was not."""


@dataclass(frozen=True)
class Task:
    """Items of one kind."""

    name: str
    score: Score
    items: tuple[Item, ...]
    references: tuple[str, ...] = ()
    """For summaries: what people wrote."""
    source: str = ""
    """Where the items come from."""
    length: int | None = None
    """Tokens of an item, of a task whose answers are retrieved from far back; None of any other."""

    def of(self, items: tuple[Item, ...]) -> Self:
        """The same with other items."""
        return replace(self, items=items)

    @property
    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"score": self.score, "items": len(self.items), "source": self.source, "length": self.length}

    @property
    def texts(self) -> list[int]:
        """How many items in a row ask of one text."""
        return [len(items) for items, _ in of_one_text(self.items)]

    @property
    def tokens(self) -> int:
        """All that a model reads and writes, what several items in a row begin with once."""
        return sum(
            sum(len(item.prompt) + len(item.answer) for item in items) - shared * (len(items) - 1)
            for items, shared in of_one_text(self.items)
        )


def of_one_text(items: Sequence[Item]) -> Iterator[tuple[list[Item], int]]:
    """Items in a row whose prompts are the same for more than half, and how many tokens of theirs are; 0 of one alone.

    At least one token of each prompt is its own.
    """
    group: list[Item] = []
    shared = 0
    for each in items:
        same = _same(group[0].prompt[:-1], each.prompt[:-1]) if group else 0
        if 2 * same > len(each.prompt):
            shared = min(shared or same, same)
            group.append(each)
            continue
        if group:
            yield group, shared
        group, shared = [each], 0
    if group:
        yield group, shared


def item(tokenizer: Any, prompt: str, answer: str, depth: float | None = None) -> Item:
    """In tokens as they are of both together, divided where those of the prompt alone end."""
    both = tokenizer(prompt + answer).input_ids
    same = _same(tokenizer(prompt).input_ids, both)
    return Item(tuple(both[:same]), tuple(both[same:]), depth)


def asked_in(task: str) -> tuple[str, int]:
    """What a task of that name asks for, and in how many tokens: `needle` and 512 of `needle at 512`, else 0."""
    what, _, length = task.rpartition(" at ")
    return (what, int(length)) if what and length.isdigit() else (task, 0)


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    unlike = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))
