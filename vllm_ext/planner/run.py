"""`vllm-ext plan --auto`: a plan searched for, judged on other items, and what was found on the way."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import own_window
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.costs import Shape, saved_kv
from vllm_ext.errors import UsageError
from vllm_ext.offline.batch import Batch
from vllm_ext.offline.evaluator import Asked
from vllm_ext.offline.model import Entered, OfflineModel, read_tokenizer
from vllm_ext.planner.constants import fit_alone
from vllm_ext.planner.judge import Goal, Judge, Judged
from vllm_ext.planner.search import Budget, Changes, Exhausted, Search, Tried
from vllm_ext.probe.attention import Looks, looks
from vllm_ext.progress import progress
from vllm_ext.tasks.items import Item, Task
from vllm_ext.tasks.passages import cut
from vllm_ext.tasks.tasks import bundled, given
from vllm_ext.tasks.texts import prose
from vllm_ext.versions import offline_versions

SEARCHED: dict[str, int] = {"capitals": 32, "sums": 24, "reading": 16, "prose": 6}
"""Items to search with, by task."""
JUDGED: dict[str, int] = {"capitals": 100, "sums": 100, "reading": 60, "prose": 16}
TASKS = tuple(SEARCHED)
OWN = 150
"""Items of a task of the user's own: a third to search with, the rest to judge on."""
CALIBRATION_TOKENS = 16_384
CALIBRATION_LENGTH = 1_024
LEVELS = (0.25, 1 / 3, 0.5, 2 / 3)
"""Parts of the KV cache to save: for each, and for what the goal asks, windows are judged on the layers that the search
found, on as many of the top ones, and on those whose attentions look near; and on the top ones with the top frozen, or
skipped."""
MOST_JUDGED = 14
SLACK = 0.02
"""Nats that a frozen or skipped top may miss beyond the windows below it."""


@dataclass(frozen=True)
class Settings:
    """How a plan is searched for.

    Raises:
        UsageError: for tasks that are not there, or sizes with which nothing could be found.

    """

    goal: Goal
    tasks: tuple[str, ...] = TASKS
    data: tuple[str, ...] = ()
    """Files with tasks of the user's own."""
    window: int = 128
    context: int = 4_096
    """Tokens of the requests for which savings are counted."""
    passes: float = 130
    """The budget: forward passes over the items of the search, judging included."""
    seed: int = 0
    quick: bool = False
    """Only guess, from what each attention looks at."""

    @classmethod
    def of(cls, header: Mapping[str, Any], goal: Goal, source: Checkpoint) -> Self:
        """Those of an earlier search, with another goal.

        Raises:
            UsageError: where that one was of another model.

        """
        model = f"{source.called} of {source.num_layers} layers"
        if (header["model"], header["layers"]) != (source.called, source.num_layers):
            raise UsageError(f"--front: it is of {header['model']} of {header['layers']} layers, and this is {model}")
        settings: dict[str, Any] = {
            name: tuple(each) if isinstance(each, list) else each for name, each in header["settings"].items()
        }
        return cls(**settings | {"goal": goal})

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise UsageError(f"--task {task}: there is none of that name; take {', '.join(TASKS)}")
        if not self.tasks and not self.data:
            raise UsageError("no task; give --task or --data")
        for option, number in (("--passes", self.passes), ("--context", self.context), ("--size", self.window)):
            if number < 1:
                raise UsageError(f"{option} {number:g}: choose 1 or more")


@dataclass
class Found:
    """What a search came to."""

    header: dict[str, Any]
    changes: Changes = field(default_factory=dict)
    """The plan that is taken; none yet where plans were judged."""
    front: list[Judged] = field(default_factory=list)
    """Plans that were judged; none where it was guessed."""
    written: Judged | None = None
    """The plan that is taken with the tensors that it is written with."""
    passes: float = 0


class Planner:
    """A model, and the items that plans of it are tried and judged with."""

    def __init__(self, source: Checkpoint, settings: Settings) -> None:
        """Read them.

        Raises:
            UsageError: for a model that cannot be read, or texts that are not there.

        """
        source.check_weights()
        self.source, self.settings = source, settings
        assert source.folder is not None
        self.config = AutoConfig.from_pretrained(source.folder)
        self.tokenizer = read_tokenizer(source)
        self.searched, self.judged = self._tasks()
        self.layers = [layer for layer in range(source.num_layers) if not own_window(self.config, layer)]
        self.model = OfflineModel(source)

    def find(self) -> Found:
        """Search and judge, or guess; says on stderr how far it is.

        Raises:
            UsageError: for a budget that is too small.

        """
        settings = self.settings
        found = Found(self._header())
        if settings.quick:
            found.changes = self._guess(settings.goal.kv_saving or LEVELS[1])
            return found
        with progress() as bars:
            bar = bars.add_task("tensors of every layer", total=settings.passes)
            fitted = fit_alone(self.model, list(self._calibration()), settings.window, self.layers)
            judging = _tokens(self.judged) / _tokens(self.searched)
            # The unchanged model is judged too, and what is written in the end.
            budget = Budget(settings.passes - judging * (MOST_JUDGED + 2))

            def tried(what: str) -> None:
                bars.update(bar, description=what, completed=budget.used)

            plans = self._plans(fitted, budget, tried)
            for number, changes in enumerate(plans):
                bars.update(bar, description=f"judging {number + 1} of {len(plans)}")
                found.front.append(self.judge(changes, fitted))
                bars.advance(bar, judging)
            found.passes = budget.used + judging * (len(plans) + 2)
        return found

    def judge(self, changes: Changes, fitted: Mapping[str, torch.Tensor]) -> Judged:
        """A plan's savings and scores."""
        saved = 1 - self._flops(changes) / self._full_flops
        return self._judge.judge(changes, fitted, self._saved(changes), saved)

    def recounted(self, judged: Judged) -> Judged:
        """One of an earlier search, with its savings as they are counted now."""
        return replace(judged, kv_saved=self._saved(judged.changes))

    def _flops(self, changes: Changes) -> int:
        """Operations of a prompt."""
        plan = AttentionPlan.of(self.source.num_layers, changes)
        return self._shape.prefill_flops(plan, self.settings.context)

    @cached_property
    def _shape(self) -> Shape:
        return Shape.of(self.config, self.source.family)

    @cached_property
    def _full_flops(self) -> int:
        return self._flops({})

    @cached_property
    def _judge(self) -> Judge:
        return Judge([Asked(self.model, task) for task in self.judged], self.settings.seed)

    def _tasks(self) -> tuple[list[Task], list[Task]]:
        """To search with, and to judge on."""
        seed, counts = self.settings.seed, SEARCHED if self.settings.quick else JUDGED
        names: Any = self.settings.tasks
        searched = [bundled(name, self.tokenizer, SEARCHED[name], seed, "search") for name in names]
        judged = [bundled(name, self.tokenizer, counts[name], seed) for name in names]
        for file in self.settings.data:
            task = given(Path(file), self.tokenizer, OWN, seed)
            if task.score == "summaries":
                raise UsageError(
                    f"--data {file}: a search needs answers, and summaries have none; give prompts with them"
                )
            if len(task.items) < 3:
                raise UsageError(f"--data {file}: it has {len(task.items)} items; give 3 or more, the more the better")
            third = len(task.items) // 3
            searched.append(replace(task, items=task.items[:third]))
            judged.append(replace(task, items=task.items[third:]))
        return searched, judged

    @cached_property
    def _passages(self) -> torch.Tensor:
        """Text to fit on and to look at, `[passages, tokens]`."""
        longest = getattr(self.config, "max_position_embeddings", CALIBRATION_LENGTH)
        return cut(
            self.tokenizer,
            prose("calibration"),
            tokens=CALIBRATION_TOKENS,
            length=min(CALIBRATION_LENGTH, longest),
            seed=self.settings.seed,
        )

    def _calibration(self) -> Iterator[Entered]:
        """Four passages at a time, where they enter the model."""
        for part in self._passages.split(4):
            batch = Batch.of([Item(tuple(each.tolist()), ()) for each in part], self.model.device)
            yield self.model.enter(batch.tokens)

    def _plans(self, fitted: Mapping[str, torch.Tensor], budget: Budget, tried: Callable[[str], None]) -> list[Changes]:
        """Windows found, on the top layers, and guessed, for each level; then those on top with the top changed."""
        levels = sorted({*LEVELS, self.settings.goal.kv_saving or LEVELS[0]})
        path: list[Tried] = []
        on_top: list[Tried] = []
        tops: list[Tried] = []
        with suppress(Exhausted):
            asked = [Asked(self.model, task) for task in self.searched]
            kinds = self.source.family.kinds
            search = Search(asked, fitted, self.settings.window, kinds, self.layers, budget, tried)
            for level in levels:
                on_top.append(search.on_top(self._reaches(level)))
                tops += search.tops(on_top[-1].changes, on_top[-1].missed + SLACK)
            path = search.windows(self._reaches(levels[-1]))
        if not on_top:
            raise UsageError(f"--passes {self.settings.passes:g}: too few to try a plan; raise it")
        found = [
            next((each for each in path if self._saved(each.changes) >= level), path[-1]) for level in levels if path
        ]
        judged = [*(plan.changes for plan in (*found, *on_top)), *map(self._guess, levels)]
        plans = {tuple(sorted(changes)): changes for changes in judged}
        return [*plans.values(), *(plan.changes for plan in tops)][:MOST_JUDGED]

    def _saved(self, changes: Changes) -> float:
        """The part of the KV-cache bytes."""
        return saved_kv(self.config, AttentionPlan.of(self.source.num_layers, changes), self.settings.context)

    def _reaches(self, level: float) -> Callable[[Changes], bool]:
        """Whether a plan saves that part."""
        return lambda changes: self._saved(changes) >= level

    def _guess(self, level: float) -> Changes:
        """Windows where most of the attention is on the first token and the neighbours, to save that part."""
        order = sorted(self.layers, key=lambda layer: -(self._seen[layer].sink + self._seen[layer].window))
        changes: dict[int, LayerPlan] = {}
        for layer in order:
            changes[layer] = LayerPlan("window", self.settings.window)
            if self._saved(changes) >= level:
                break
        return changes

    @cached_property
    def _seen(self) -> list[Looks]:
        """What each layer's attention looks at."""
        text, seen = next(self._calibration()), []
        for layer in range(self.source.num_layers):
            seen.append(looks(self.model, layer, [text]))
            text.forget(layer)
        return seen

    def _header(self) -> dict[str, Any]:
        return {
            "model": self.source.called,
            "layers": self.source.num_layers,
            "settings": asdict(self.settings),
            "searched": {task.name: len(task.items) for task in self.searched},
            "tasks": {task.name: task.about for task in self.judged},
            "versions": offline_versions(),
            "machine": f"{platform.machine()}, {self.model.device}",
        }


def _tokens(tasks: Sequence[Task]) -> int:
    return sum(task.tokens for task in tasks)
