"""A task's score under a change of the model: items in batches, their layers run from the lowest changed one on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from vllm_ext.offline.batch import Batch
from vllm_ext.offline.model import Activations, Fitted, OfflineModel, PlannedModel, Plans, generate
from vllm_ext.tasks.items import Item, Task, of_one_text
from vllm_ext.tasks.tasks import SUMMARY_TOKENS
from vllm_ext.tasks.texts import missing

BATCH_TOKENS = 2_048
"""Of a batch, its padding included."""
FORKED_TOKENS = 1_024
"""That items of one text may have of their own in a batch."""


@dataclass(frozen=True)
class Scores:
    """What a model made of a task, item by item."""

    scores: list[float]
    nll: list[float]
    """Nats a token of the answers; none where the model writes them itself."""


@dataclass(frozen=True)
class Manipulation:
    """What is done at one layer."""

    layer: int
    plans: Plans = field(default_factory=dict)
    """What layers attend otherwise."""
    edit: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """From the states that enter the layer, `[batch, length, hidden_size]`, and which rows are previous tokens,
    `[batch, length]`, to other states."""


class Evaluator:
    """A task's items in batches of about one length, with what the unchanged model makes of each at every layer.

    A text that several items in a row begin with is read once.
    """

    def __init__(self, model: OfflineModel, task: Task, tokenizer: Any = None) -> None:
        """`tokenizer` reads what is written, for summaries."""
        self.model, self.task, self.tokenizer = model, task, tokenizer
        self.order: list[int] = []
        self.batches: list[tuple[Batch, Activations | None]] = []
        for numbers, text in _batches(task):
            items = [task.items[number] for number in numbers]
            batch = Batch.of_text(items, text, model.device) if text else Batch.of(items, model.device)
            entered = None if task.score == "summaries" else model.enter(batch.tokens, **batch.settings)
            self.order += numbers
            self.batches.append((batch, entered))

    def forget(self, layer: int) -> None:
        """Let go of what enters the layers between the first and that one."""
        for _, entered in self.batches:
            if entered is not None:
                entered.forget(layer)

    def plan(self, plans: Plans, fitted: Fitted) -> Scores:
        """Under an attention plan, as it is served: the prompts' last tokens are frozen too."""
        return self._scores(Manipulation(min(plans, default=0), plans), fitted, lambda batch: batch.prompt_rows)

    def manipulated(self, manipulation: Manipulation) -> Scores:
        """Under one of the paper's manipulations."""
        return self._scores(manipulation, {}, lambda batch: batch.previous_rows)

    def _scores(
        self, manipulation: Manipulation, fitted: Fitted, frozen_rows: Callable[[Batch], torch.Tensor]
    ) -> Scores:
        scores: list[float] = []
        nll: list[float] = []
        for batch, entered in self.batches:
            changed = PlannedModel(self.model, manipulation.plans, fitted, frozen_rows(batch))
            if entered is None:
                scores += self._written(batch, changed, manipulation, len(scores))
                continue
            first = manipulation.layer
            states = entered.state(self.model, first)
            if manipulation.edit is not None:
                states = manipulation.edit(states, batch.previous_rows)
            ours = score(self.model, batch, changed.run(entered, states, first))
            for right, lost in ours:
                scores.append(float(right.all()) if self.task.score == "answers" else float(right.float().mean()))
                nll.append(float(lost.mean()))
        return Scores(self._in_order(scores), self._in_order(nll))

    def _written(self, batch: Batch, changed: PlannedModel, manipulation: Manipulation, start: int) -> list[float]:
        """ROUGE-L's F of what the model writes, up to its first line's end."""
        edit = manipulation.edit
        rows = batch.previous_rows
        tokens = generate(
            changed,
            batch.tokens,
            SUMMARY_TOKENS,
            manipulation.layer,
            None if edit is None else lambda states: edit(states, rows),
        )
        written = [each.split("\n")[0] for each in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        wanted = [self.task.references[number] for number in self.order[start : start + len(written)]]
        return [_rouge(ours, theirs) for ours, theirs in zip(written, wanted, strict=True)]

    def _in_order(self, values: list[float]) -> list[float]:
        """As the items are in the task."""
        return [value for _, value in sorted(zip(self.order, values, strict=False))]


def score(model: OfflineModel, batch: Batch, left: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each item, which tokens of its answer are the first choice, and the nats of each.

    `left` `[batch, length, hidden_size]` is what leaves the last layer.
    """
    rows = batch.answering_rows
    targets = batch.tokens.roll(-1, 1)[rows]
    right, lost, start = [], [], 0
    for logits in model.logits(left[rows]):
        wanted = targets[start : start + len(logits)]
        right.append(logits.argmax(-1) == wanted)
        lost.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        start += len(logits)
    yield from zip(torch.cat(right).cpu().split(batch.sizes), torch.cat(lost).cpu().split(batch.sizes), strict=True)


def _length(item: Item) -> int:
    return len(item.prompt) + len(item.answer)


def _batches(task: Task) -> Iterator[tuple[list[int], int]]:
    """Numbers of items: those of one text, with its tokens; others by length, `BATCH_TOKENS` or one item, with 0."""
    alone: list[int] = []
    numbers = iter(range(len(task.items)))
    for items, text in of_one_text(task.items):
        group = list(islice(numbers, len(items)))
        if not text or task.score == "summaries":
            alone += group
            continue
        most = max(1, FORKED_TOKENS // max(_length(item) - text for item in items))
        yield from ((group[start : start + most], text) for start in range(0, len(group), most))
    batch: list[int] = []
    for number in sorted(alone, key=lambda number: _length(task.items[number])):
        if batch and (len(batch) + 1) * _length(task.items[number]) > BATCH_TOKENS:
            yield batch, 0
            batch = []
        batch.append(number)
    if batch:
        yield batch, 0


def _rouge(ours: str, theirs: str) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing("rouge-score") from None
    return float(RougeScorer(["rougeL"], use_stemmer=True).score(theirs, ours)["rougeL"].fmeasure)
