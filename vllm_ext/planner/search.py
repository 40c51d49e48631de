"""The search: windows on as many layers as can be, from the scan's order, and a top that is frozen or left out.

*Attend First, Consolidate Later* (arXiv 2409.03621) finds by hand how many of the top layers can do without attention.
But a layer that fetches may lie anywhere, so here the layers that are missed least go first. For each size of window it
is sought how many of them may have it; then whether the rest, which fetch, may have a larger one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from model_executors.attention_plan import FULL, AttentionPlan, Kind, LayerPlan
from vllm_ext.planner.scan import Scan
from vllm_ext.planner.trials import Changes, Trials

SLACKS = (0.02, 0.05)
"""Nats a token that plans may miss: the search finds the most that can be saved for each."""
SLACK = 0.02
"""Nats that a frozen or skipped top may miss beyond the windows below it."""
LINEAR = LayerPlan("skip", consolidation="linear")


@dataclass(frozen=True)
class Trial:
    """A plan, and what it misses on the search's items."""

    changes: Changes
    missed: float


class Search:
    """Plans of a model, tried on the search's items."""

    def __init__(
        self,
        trials: Trials,
        scan: Scan,
        windows: Sequence[int],
        sinks: Sequence[int],
        kinds: Iterable[Kind],
        saved: Callable[[Changes], float],
    ) -> None:
        """`saved` tells which part of the KV cache a plan saves."""
        self.trials, self.scan, self.windows, self.sinks = trials, scan, windows, sinks
        self.kinds, self.saved = tuple(kinds), saved
        self.num_layers = trials.num_layers

    def most(self, slack: float, window: LayerPlan, order: Sequence[int], below: Changes) -> Trial:
        """That window on as many layers of `order`, the first ones, as miss no more than `slack` with what is `below`.

        By halves, as if each layer more were missed more: some five trials. A layer more may save less, since groups of
        the KV cache are padded; so many layers are not tried.
        """
        plans = self._steps(below, {**below, **dict.fromkeys(order, window)}, order)
        best = Trial(below, self.trials.missed(below))
        low, high = 0, len(plans) - 1
        place = high  # the most of them, first
        while low < high:
            missed = self.trials.missed(plans[place], slack)
            if missed <= slack:
                best, low = Trial(plans[place], missed), place
            else:
                high = place - 1
            place = (low + high + 1) // 2
        return best

    def windows_of(self, slack: float) -> list[Trial]:
        """For each size of window, the most layers; and others in a larger one besides, where that saves more.

        A larger one may take what a smaller slack has left of this one.
        """
        found = []
        for size in self.windows:
            for part in (each for each in SLACKS if each <= slack):
                one = self.most(part, LayerPlan("window", size), self.scan.order, {})
                if not one.changes:
                    continue
                found.append(one)
                rest = [layer for layer in self.scan.order if layer not in one.changes]
                for larger in (each for each in self.windows if each > size):
                    found.append(self.most(slack, LayerPlan("window", larger), rest, one.changes))
        return found

    def front(self) -> list[Trial]:
        """The plans of which none misses less and saves more; those that save most are tried with other sinks too."""
        found: list[Trial] = []
        for slack in SLACKS:
            plans = self.windows_of(slack)
            if plans:
                best = max(plans, key=lambda each: self.saved(each.changes))
                plans += [self._sunk(best, sink) for sink in self.sinks if sink != LayerPlan("window", 1).sink]
            found += plans
        found = [
            each
            for each in found
            if not any(
                self.saved(other.changes) >= self.saved(each.changes) and other.missed < each.missed for other in found
            )
        ]
        return list({tuple(sorted(each.changes.items())): each for each in found}.values())

    def between(self, less: Changes, more: Changes, wanted: float) -> Trial:
        """Of the layers where they differ, those that are missed least as in `more`, and the others as in `less`.

        As many as save what is nearest to `wanted`; half of them where no number saves more than fewer do.
        """
        differ = [layer for layer in self.scan.order if less.get(layer) != more.get(layer)]
        steps = self._steps(less, more, differ)[1:]
        inner = [each for each in steps if each != more] or [_mixed(less, more, differ[: len(differ) // 2])]
        changes = min(inner, key=lambda each: abs(self.saved(each) - wanted))
        return Trial(changes, self.trials.missed(changes))

    def tops(self, below: Trial) -> list[Trial]:
        """The same with the top layers frozen, or skipped with linear maps: as many as miss little more.

        Only above the last layer that fetches: one that is frozen, or left out, fetches nothing.
        """
        lowest = max(self.scan.fetching, default=0) + 1
        found = []
        for make in (self._frozen, self._skipped):
            best = None
            for first in range(self.num_layers - 1, lowest - 1, -1):
                try:
                    changes = make(below.changes, first)
                    AttentionPlan.of(self.num_layers, changes)
                except ValueError:  # no such plan
                    break
                if (missed := self.trials.missed(changes, below.missed + SLACK)) > below.missed + SLACK:
                    break
                best = Trial(changes, missed)
            found += [] if best is None else [best]
        return found

    def _steps(self, less: Changes, more: Changes, order: Sequence[int]) -> list[Changes]:
        """`less`, and with the first layers of `order` as in `more`: as many as save more than any fewer do."""
        plans = [_mixed(less, more, order[:count]) for count in range(len(order) + 1)]
        saved = [self.saved(each) for each in plans]
        return [each for count, each in enumerate(plans) if not count or saved[count] > max(saved[:count])]

    def _sunk(self, trial: Trial, sink: int) -> Trial:
        changes = {layer: replace(plan, sink=sink) for layer, plan in trial.changes.items()}
        return Trial(changes, self.trials.missed(changes))

    def _frozen(self, changes: Changes, first: int) -> Changes:
        if "freeze" not in self.kinds:
            raise ValueError("the family has no frozen layers")
        tops = {layer: changes.get(layer, FULL) for layer in range(first, self.num_layers)}
        return {**changes, **{layer: LayerPlan("freeze", each.window, each.sink) for layer, each in tops.items()}}

    def _skipped(self, changes: Changes, first: int) -> Changes:
        if first not in self.scan.layers:
            raise ValueError(f"layer {first} is not to be changed")
        return {**changes, **dict.fromkeys(range(first, self.num_layers), LINEAR)}


def _mixed(less: Changes, more: Changes, layers: Sequence[int]) -> Changes:
    """Those layers as in `more`, and the others as in `less`."""
    taken = {layer: more if layer in layers else less for layer in {**less, **more}}
    return {layer: plans[layer] for layer, plans in taken.items() if layer in plans}
