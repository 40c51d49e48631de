"""`vllm-ext search`: layers scanned, plans searched for and judged on other items, and what was found on the way."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from transformers import AutoConfig

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import own_window
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.costs import Shape, saved_kv
from vllm_ext.errors import UsageError
from vllm_ext.offline.batch import Batch
from vllm_ext.offline.model import Activations, OfflineModel, read_tokenizer
from vllm_ext.planner.judge import Judged, judge
from vllm_ext.planner.linear import fit_alone
from vllm_ext.planner.scan import Scan, scan
from vllm_ext.planner.search import Search, Trial
from vllm_ext.planner.settings import SINKS, SearchSettings
from vllm_ext.planner.trials import KEYS, Changes, Trials
from vllm_ext.progress import progress
from vllm_ext.reports.journal import Journal
from vllm_ext.tasks.items import Item, Split, Task
from vllm_ext.tasks.passages import cut
from vllm_ext.tasks.texts import prose
from vllm_ext.versions import offline_versions

JOURNAL = "trials.jsonl"
CALIBRATION_TOKENS = 16_384
CALIBRATION_LENGTH = 1_024
MOST_JUDGED = 4
"""Plans of windows: judging one reads as much as many trials do."""
LEAST_SAVED = 0.2
"""Of the KV cache: what saves less is not judged for the sake of a gap."""
QUICK_SLACK = 0.02
"""Nats a token that a plan of the scan alone may miss."""


@dataclass
class Front:
    """What a search came to."""

    header: dict[str, Any]
    scan: Scan | None = None
    plans: list[Judged] = field(default_factory=list)


class Planner:
    """A model, the tasks that plans of it are tried and judged on, and a folder that keeps every trial."""

    def __init__(self, source: Checkpoint, settings: SearchSettings, out: Path) -> None:
        """Read them, and what an earlier run left in the folder.

        Raises:
            UsageError: for a model that cannot be read, texts that are not there, or a folder of other results.

        """
        source.check_weights()
        assert source.folder is not None
        self.source, self.settings = source, settings
        self.config = AutoConfig.from_pretrained(source.folder)
        tokenizer = read_tokenizer(source)
        tasks = {split: settings.made(tokenizer, split) for split in ("search", "judge")}
        longest = getattr(self.config, "max_position_embeddings", None)
        for task in tasks["judge"]:
            if task.length is not None and longest is not None and task.length > longest:
                raise UsageError(f"--length {task.length}: the model takes {longest} tokens; lower it")
        self.layers = [layer for layer in range(source.num_layers) if own_window(self.config, layer) is None]
        self.windows = looked_beyond(settings.windows, tasks["search"])
        self.header = {
            "model": source.called,
            "layers": source.num_layers,
            "settings": asdict(settings) | {"data": [Path(file).name for file in settings.data]},
            "searched": {task.name: len(task.items) for task in tasks["search"]},
            "tasks": {task.name: task.about for task in tasks["judge"]},
            "versions": offline_versions(),
            "machine": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
        }
        self.journal = Journal(out / JOURNAL, self.header, KEYS)
        self.bars: Progress | None = None
        self.bar: TaskID | None = None
        self.tokenizer = tokenizer
        self.search, self.judge = (self._trials(tasks[split], split) for split in ("search", "judge"))

    def find(self) -> Front:
        """Scan, search and judge, or only scan, and leave the folder to others; says on stderr how far it is."""
        front = Front(self.journal.header)
        with progress() as self.bars:
            front.scan = self._scan()
            found = self._quick(front.scan) if self.settings.quick else self._searched(front.scan)
            self._stage("judging", sum(task.tokens for task in self.judge.tasks) * (1 + len(found)))
            for each in found:
                saved, work = self._saved(each.changes), 1 - self._flops(each.changes) / self._flops({})
                front.plans.append(judge(self.judge, each.changes, self.settings.seed, saved, work, each.missed))
        self.journal.close()
        return front

    def _scan(self) -> Scan:
        tokens = sum(task.tokens for task in self.search.tasks if task.length is not None)
        self._stage("scan", tokens * (1 + len(self.layers)))
        heads = 0 if self.settings.quick else Shape.of(self.config, self.source.family).kv_heads
        return scan(self.search, self.windows[0], self.layers, heads)

    def _quick(self, scanned: Scan) -> list[Trial]:
        """One size of window, on as many layers as miss little; no search beyond the scan's own items."""
        self._stage("windows on the layers that are missed least", None)
        search = self._search(scanned)
        return [search.most(QUICK_SLACK, LayerPlan("window", self.windows[-1]), scanned.order, {})]

    def _searched(self, scanned: Scan) -> list[Trial]:
        """Plans of windows of which none misses less and saves more, and some between; and the first with a new top."""
        self._stage("search", None)
        search = self._search(scanned)
        windows = spread(sorted(search.front(), key=lambda each: -self._saved(each.changes)))
        tops = [] if self.settings.windows_only else [top for each in windows[:1] for top in search.tops(each)]
        return [*filled(windows, self._saved, search.between), *tops]

    def _search(self, scanned: Scan) -> Search:
        return Search(self.search, scanned, self.windows, SINKS, self.source.family.kinds, self._saved)

    def _trials(self, tasks: Any, split: Split) -> Trials:
        return Trials(
            lambda: self._model, tasks, split, self.journal, self.source.num_layers, lambda: self._fitted, self._tell
        )

    @cached_property
    def _model(self) -> OfflineModel:
        return OfflineModel(self.source)

    @cached_property
    def _fitted(self) -> Mapping[str, torch.Tensor]:
        """The linear map of every layer."""
        return fit_alone(self._model, list(self._calibration()), self.layers)

    def _calibration(self) -> Iterator[Activations]:
        """Text to fit on, four passages at a time, where they enter the model."""
        longest = getattr(self.config, "max_position_embeddings", CALIBRATION_LENGTH)
        length = min(CALIBRATION_LENGTH, longest)
        passages = cut(
            self.tokenizer, prose("calibration"), tokens=CALIBRATION_TOKENS, length=length, seed=self.settings.seed
        )
        for part in passages.split(4):
            batch = Batch.of([Item(tuple(each.tolist()), ()) for each in part], self._model.device)
            yield self._model.enter(batch.tokens)

    def _stage(self, what: str, tokens: int | None) -> None:
        """A bar of its own; of a search, no one knows how many trials there are."""
        assert self.bars is not None
        if self.bar is not None:
            self.bars.update(self.bar, visible=False)
        self.bar = self.bars.add_task(what, total=tokens)
        self.stage = what

    def _tell(self, task: str, tokens: int) -> None:
        if self.bars is not None and self.bar is not None:
            self.bars.update(self.bar, description=f"{self.stage}: {task}")
            self.bars.advance(self.bar, tokens)

    def _saved(self, changes: Changes) -> float:
        """The part of the KV-cache bytes."""
        return saved_kv(self.config, AttentionPlan.of(self.source.num_layers, changes), self.settings.context)

    def _flops(self, changes: Changes) -> float:
        """Operations of a prompt."""
        plan = AttentionPlan.of(self.source.num_layers, changes)
        return Shape.of(self.config, self.source.family).prefill_flops(plan, self.settings.context)


def looked_beyond(windows: Sequence[int], tasks: Sequence[Task]) -> list[int]:
    """The windows, smallest first, that some item is twice as long as: what a larger one forgets, no item would miss.

    Items of tasks that retrieve are asked, where there are any.

    Raises:
        UsageError: where there is none.

    """
    lengths = [task.length for task in tasks if task.length is not None]
    longest = max(lengths or [len(each.prompt) + len(each.answer) for task in tasks for each in task.items])
    seen = sorted(size for size in windows if 2 * size <= longest)
    if not seen:
        smallest = min(windows)
        raise UsageError(f"--window {smallest}: no item has {2 * smallest} tokens, to miss what it forgets; lower it")
    return seen


def spread(plans: Sequence[Trial]) -> list[Trial]:
    """Of plans in order, the first, the last and what lies evenly between, `MOST_JUDGED` of them at most."""
    if len(plans) <= MOST_JUDGED:
        return list(plans)
    return [plans[round(number * (len(plans) - 1) / (MOST_JUDGED - 1))] for number in range(MOST_JUDGED)]


def filled(
    plans: Sequence[Trial], saved: Callable[[Changes], float], between: Callable[[Changes, Changes, float], Trial]
) -> list[Trial]:
    """More plans than there are, up to `MOST_JUDGED`, each in the middle of the two whose savings are furthest apart.

    The last of these is the unchanged model, as if it saved `LEAST_SAVED`. A search asks few items, on which plans seem
    much alike that are not so to the judge.
    """
    made = list(plans)
    while made and len(made) < MOST_JUDGED:
        bounds = [*(each.changes for each in made), {}]
        savings = [*(saved(each.changes) for each in made), LEAST_SAVED]
        place = max(range(1, len(bounds)), key=lambda each: savings[each - 1] - savings[each])
        found = between(bounds[place], bounds[place - 1], (savings[place] + savings[place - 1]) / 2)
        if not savings[place] < saved(found.changes) < savings[place - 1]:
            break  # too little, or no more than a neighbour, as groups of the KV cache are padded
        made.insert(place, found)
    return made
