"""What a model is asked: items of a prompt and its answer, and tasks of items that are scored alike."""

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
    def tokens(self) -> int:
        """All that a model reads and writes."""
        return sum(len(item.prompt) + len(item.answer) for item in self.items)


def item(tokenizer: Any, prompt: str, answer: str, depth: float | None = None) -> Item:
    """In tokens as they are of both together, divided where those of the prompt alone end."""
    alone, both = tokenizer(prompt).input_ids, tokenizer(prompt + answer).input_ids
    same = next((n for n, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), min(len(alone), len(both)))
    return Item(tuple(both[:same]), tuple(both[same:]), depth)
