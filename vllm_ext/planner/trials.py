"""Plans tried on tasks: what is missed with a plan, each trial written down and never made twice."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from model_executors.attention_plan import SINK, AttentionPlan, LayerPlan
from vllm_ext.offline.attentions import attending
from vllm_ext.offline.evaluator import Evaluator, Manipulation, Scores
from vllm_ext.offline.model import OfflineModel
from vllm_ext.planner.kv_heads import WindowedHead
from vllm_ext.reports.journal import Journal
from vllm_ext.tasks.items import Split, Task

KEYS = ("split", "task", "plan")
Changes = Mapping[int, LayerPlan]


class Trials:
    """Of one model's plans, on one split's tasks."""

    def __init__(
        self,
        model: Callable[[], OfflineModel],
        tasks: Sequence[Task],
        split: Split,
        journal: Journal,
        num_layers: int,
        fitted: Callable[[], Mapping[str, torch.Tensor]],
        tell: Callable[[str, int], None],
    ) -> None:
        """`model` and `fitted` are asked for when something is to be computed; `tell` is told what, and its tokens."""
        self.model, self.tasks, self.split, self.journal = model, tasks, split, journal
        self.num_layers, self.fitted, self.tell = num_layers, fitted, tell

    def scores(self, task: Task, changes: Changes) -> Scores:
        """What the model makes of a task under a plan."""
        plan = AttentionPlan.of(self.num_layers, changes)
        key = {"split": self.split, "task": task.name, "plan": plan.to_config()["attention_plan"]}
        row = self.journal.get(**key)
        if row is None:
            evaluator = self._evaluators[task.name]
            evaluator.forget(min(changes, default=self.num_layers))
            needed = self.fitted() if any(each.consolidation != "none" for each in plan.layers) else {}
            row = self._written(key, evaluator.plan(changes, needed), task.tokens)
        return Scores(row["scores"], row["nll"])

    def head_lost(self, task: Task, layer: int, window: int, head: int) -> float:
        """Nats a token of the answers, where one KV head of one layer has a window."""
        key = {"split": self.split, "task": task.name, "plan": {"layer": layer, "window": window, "kv_head": head}}
        row = self.journal.get(**key)
        if row is None:
            evaluator, attention = self._evaluators[task.name], self.model().attention(layer)
            evaluator.forget(layer)
            with attending(attention, attend=WindowedHead(window, SINK, head)):
                row = self._written(key, evaluator.manipulated(Manipulation(layer)), task.tokens)
        return self._beside(task, row["nll"])

    def _written(self, key: dict[str, Any], found: Scores, tokens: int) -> dict[str, Any]:
        """The row, written down."""
        row = {**key, "scores": found.scores, "nll": found.nll}
        self.journal.add(row)
        self.tell(key["task"], tokens)
        return row

    def lost(self, task: Task, changes: Changes) -> float:
        """Nats a token of the answers that the unchanged model gives, beside it; below 0 where it is surer."""
        return self._beside(task, self.scores(task, changes).nll)

    def missed(self, changes: Changes, enough: float = float("inf")) -> float:
        """Nats a token: of all tasks in the mean, or half of what the worst misses, whichever is more.

        Tasks are tried shortest first, and no more of them where `enough` is missed already.
        """
        more: list[float] = []
        for task in sorted(self.tasks, key=lambda task: task.tokens):
            more.append(max(self.lost(task, changes), 0.0))
            if max(more) / 2 > enough:
                break
        return max(sum(more) / len(self.tasks), max(more) / 2)

    def _beside(self, task: Task, nll: Sequence[float]) -> float:
        """More nats than of the unchanged model, an item counted by what that scores: none forgets what it never knew.

        Where it knows nothing, all items count.
        """
        stock = self.scores(task, {})
        more = [after - before for after, before in zip(nll, stock.nll, strict=True)]
        return fmean(more, stock.scores if any(stock.scores) else None)

    @cached_property
    def _evaluators(self) -> dict[str, Evaluator]:
        return {task.name: Evaluator(self.model(), task) for task in self.tasks}
