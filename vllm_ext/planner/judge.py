"""Plans judged on other items than they were found with, and which of them is taken."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_ext.errors import UsageError
from vllm_ext.planner.trials import Changes, Trials
from vllm_ext.reports.figures import Figure, accuracy


@dataclass(frozen=True)
class Judged:
    """What a plan saves, and what it keeps of the unchanged model's scores."""

    changes: Changes
    kv_saved: float
    prefill_saved: float
    tasks: dict[str, Figure]
    """Scores by task, with their ratios to the unchanged model's."""
    kept: float
    """The mean score of all tasks, as a part of the unchanged model's."""
    missed: float = 0.0
    """Nats a token on the search's items."""
    depths: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of tasks that retrieve, by name: each item's `depth`, its `length` in tokens and its `score`, and what the
    unchanged model scores, `stock`."""

    @property
    def worst(self) -> float:
        """The least part of a task's score that is kept."""
        return min((task.ratio for task in self.tasks.values() if task.ratio is not None), default=1.0)

    @property
    def loss(self) -> float:
        """Of the mean score, or half of what a task loses for sure, whichever is more: a task has too few items to tell
        a few hundredths from chance, so there the near end of its interval counts.

        So no task, and no length of one that retrieves, may surely lose more than twice what the mean may.
        """
        sure = (each.interval[1] if each.interval else each.ratio for each in self.tasks.values())
        return max(1 - self.kept, *((1 - kept) / 2 for kept in sure if kept is not None))


@dataclass(frozen=True)
class Goal:
    """What a plan is to keep or to save.

    Raises:
        UsageError: for parts outside of 0 to 1, or neither.

    """

    max_loss: float | None = None
    """Of the mean task score; no task may surely lose more than twice as much."""
    kv_saving: float | None = None
    """The least part of the KV-cache bytes to save."""

    def __post_init__(self) -> None:
        for option, part in (("--max-loss", self.max_loss), ("--kv-saving", self.kv_saving)):
            if part is not None and not 0 <= part < 1:
                raise UsageError(f"{option} {part}: it is a part of all; give 0 or more, and less than 1")
        if self.max_loss is self.kv_saving is None:
            raise UsageError("no goal; give --max-loss, --kv-saving or both")

    def choose(self, judged: Sequence[Judged]) -> Judged:
        """The plan that saves most and loses no more than it may; without `max_loss`, the one that loses least.

        Raises:
            UsageError: where none is good enough.

        """
        saving = [each for each in judged if each.kv_saved >= (self.kv_saving or 0)]
        if self.max_loss is None:
            if saving:
                return min(saving, key=lambda each: (each.loss, -each.prefill_saved))
            most = max((each.kv_saved for each in judged), default=0.0)
            raise UsageError(f"--kv-saving {self.kv_saving}: the plans found save up to {most:.2f}; ask for less")
        good = [each for each in saving if each.loss <= self.max_loss]
        if good:
            return max(good, key=lambda each: (each.kv_saved, each.prefill_saved))
        least = min((each.loss for each in saving), default=1.0)
        raise UsageError(
            f"--max-loss {self.max_loss}: the plans found that save enough lose at least {least:.3f}; "
            "allow more, or save less"
        )


def judge(
    trials: Trials, changes: Changes, seed: int, kv_saved: float, prefill_saved: float, missed: float = 0.0
) -> Judged:
    """Score a plan on the judge's items.

    Raises:
        UsageError: where the unchanged model gets none of them right.

    """
    before = {task.name: trials.scores(task, {}).scores for task in trials.tasks}
    if not any(any(scores) for scores in before.values()):
        raise UsageError(f"the model gets nothing right of {', '.join(before)}; give it other tasks")
    after = {task.name: trials.scores(task, changes).scores for task in trials.tasks}
    figures = {task.name: accuracy(after[task.name], before[task.name], seed, task.texts) for task in trials.tasks}
    before_all = sum(sum(scores) / len(scores) for scores in before.values())
    depths = {
        task.name: {
            "depth": [each.depth if each.depth is not None else 0.0 for each in task.items],
            "length": [float(len(each.prompt) + len(each.answer)) for each in task.items],
            "score": after[task.name],
            "stock": before[task.name],
        }
        for task in trials.tasks
        if task.length is not None
    }
    kept = sum(figure.value for figure in figures.values()) / before_all
    return Judged(changes, kv_saved, prefill_saved, figures, kept, missed, depths)
