"""A search over attention plans that keeps within a budget of forward passes.

*Attend First, Consolidate Later* (arXiv 2409.03621) finds by hand how many of the top layers can do without attention.
Here each layer is tried alone, then windows are given to more and more layers, the least missed first, or to as many of
the top ones; and it is tried to leave the top layers out, or to freeze them. What is missed is measured on tasks that
retrieve and on prose together: on prose alone the lower layers, which gather, look idle.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from model_executors.attention_plan import FULL, AttentionPlan, Kind, LayerPlan
from vllm_ext.offline.evaluator import Asked, Scores
from vllm_ext.planner.constants import LINEAR

CANDIDATES = 3
"""Layers tried at each step."""
ENOUGH = 0.3
"""Nats: a plan that misses more leads nowhere."""

Changes = Mapping[int, LayerPlan]


class Exhausted(Exception):  # noqa: N818 - the planned end
    """The budget is used up."""


@dataclass
class Budget:
    """Forward passes of the whole model over all items of the search."""

    passes: float
    used: float = 0

    def take(self, passes: float) -> None:
        """Use some.

        Raises:
            Exhausted: where there are not as many left.

        """
        if self.used + passes > self.passes:
            raise Exhausted
        self.used += passes


@dataclass(frozen=True)
class Tried:
    """A plan, and what it misses on the search's items."""

    changes: Changes
    missed: float


class Search:
    """Plans of a model, tried on a search's items with tensors that were fitted layer by layer alone."""

    def __init__(
        self,
        asked: Sequence[Asked],
        fitted: Mapping[str, torch.Tensor],
        window: int,
        kinds: Iterable[Kind],
        layers: Sequence[int],
        budget: Budget,
        done: Callable[[str], None],
    ) -> None:
        """`layers` are those that may be changed; `done` is told what was tried."""
        self.asked, self.fitted, self.budget, self.done = asked, fitted, budget, done
        self.window, self.kinds, self.layers = LayerPlan("window", window), tuple(kinds), layers
        self.num_layers = len(asked[0].model.layers)
        self.tried: dict[frozenset[tuple[int, LayerPlan]], float] = {}
        self.unchanged = [each.plan({}, {}) for each in asked]
        budget.take(1)

    def missed(self, changes: Changes) -> float:
        """Nats a token: of all tasks in the mean, or half of what the worst misses, whichever is more.

        Raises:
            Exhausted: where the budget does not reach.

        """
        key = frozenset(changes.items())
        if key not in self.tried:
            self.budget.take((self.num_layers - min(changes, default=self.num_layers)) / self.num_layers)
            more = [
                max(_mean(each.plan(changes, self.fitted)) - _mean(before), 0.0)
                for each, before in zip(self.asked, self.unchanged, strict=True)
            ]
            self.tried[key] = max(sum(more) / len(more), max(more) / 2)
            self.done(f"{len(changes)} layers changed")
        return self.tried[key]

    def alone(self, plan: LayerPlan) -> dict[int, float]:
        """What each layer misses with that plan, all others as they are."""
        return {layer: self.missed({layer: plan}) for layer in self.layers}

    def windows(self, enough: Callable[[Changes], bool] = lambda changes: False) -> list[Tried]:
        """Windows on one layer more each time, the one that is missed least; as far as the budget and sense reach."""
        path: list[Tried] = []
        with suppress(Exhausted):
            alone = self.alone(self.window)
            changes: dict[int, LayerPlan] = {}
            while rest := sorted(alone.keys() - changes.keys(), key=lambda layer: alone[layer])[:CANDIDATES]:
                missed, layer = min((self.missed(changes | {each: self.window}), each) for each in rest)
                if missed > ENOUGH:
                    break
                changes[layer] = self.window
                path.append(Tried(dict(changes), missed))
                if enough(changes):
                    break
        return path

    def on_top(self, enough: Callable[[Changes], bool]) -> Tried:
        """Windows on the top layers, which the paper would leave out first; on all, where less is not enough."""
        for count in range(1, len(self.layers) + 1):
            changes = dict.fromkeys(self.layers[-count:], self.window)
            if enough(changes):
                break
        return Tried(changes, self.missed(changes))

    def tops(self, changes: Changes, most: float) -> list[Tried]:
        """The same with the top layers frozen, or skipped with linear maps: as many as miss no more than `most`."""
        found = []
        for make in (self._frozen, self._skipped):
            best = None
            with suppress(Exhausted, ValueError):  # no such plan
                for first in range(self.num_layers - 1, 0, -1):
                    other = make(changes, first)
                    AttentionPlan.of(self.num_layers, other)
                    if (missed := self.missed(other)) > most:
                        break
                    best = Tried(other, missed)
            found += [] if best is None else [best]
        return found

    def _frozen(self, changes: Changes, first: int) -> Changes:
        if "freeze" not in self.kinds:
            raise ValueError("the family has no frozen layers")
        above = range(first, self.num_layers)
        return {**changes, **{each: LayerPlan("freeze", changes.get(each, FULL).window) for each in above}}

    def _skipped(self, changes: Changes, first: int) -> Changes:
        if first not in self.layers:
            raise ValueError(f"layer {first} is not to be changed")
        return {**changes, **dict.fromkeys(range(first, self.num_layers), LINEAR)}


def _mean(scores: Scores) -> float:
    return sum(scores.nll) / len(scores.nll)
