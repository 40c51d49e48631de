"""`vllm-ext probe`: the papers' manipulations at every layer, task by task, each result written as it is found.

Layers are taken from the lowest up, so that what the unchanged model makes of the texts is computed once and only its
state at one layer is held. A run that was interrupted goes on where it stopped.
"""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.offline.evaluator import Evaluator, Manipulation
from vllm_ext.offline.model import OfflineModel, read_tokenizer
from vllm_ext.probe.attention import attention_stats
from vllm_ext.probe.injection import Pairs
from vllm_ext.probe.manipulations import NAMES as MANIPULATIONS
from vllm_ext.probe.manipulations import Name as ManipulationName
from vllm_ext.probe.manipulations import manipulation
from vllm_ext.progress import progress
from vllm_ext.reports.journal import Journal
from vllm_ext.tasks import retrieval
from vllm_ext.tasks.files import read_task
from vllm_ext.tasks.items import Task
from vllm_ext.tasks.tasks import NAMES, SUMMARY_TOKENS, bundled
from vllm_ext.versions import offline_versions

RESULTS = "results.jsonl"
LOOKS_PASSAGES = 4


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, and on how much.

    Raises:
        UsageError: for what is not there, or too little.

    """

    tasks: tuple[str, ...] = (*NAMES, "needle")
    data: tuple[str, ...] = ()
    """Files with tasks of the user's own."""
    manipulations: tuple[ManipulationName, ...] = MANIPULATIONS
    lengths: tuple[int, ...] = (512,)
    """Tokens of the items of tasks that retrieve."""
    items: int = 40
    """Of each task; of those whose items are long, a fifth as many."""
    every: int = 1
    """Only every so many layers, the lowest first."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, values, known in (
            ("--task", self.tasks, (*NAMES, *retrieval.NAMES)),
            ("--manipulation", self.manipulations, MANIPULATIONS),
        ):
            for value in values:
                if value not in known:
                    raise UsageError(f"{option} {value}: there is none of that name; take {', '.join(known)}")
        if not self.tasks and not self.data:
            raise UsageError("no task; give --task or --data")
        for option, number in (("--items", self.items), ("--every", self.every)):
            if number < 1:
                raise UsageError(f"{option} {number}: choose 1 or more")

    def count(self, name: str) -> int:
        """How many items that task has."""
        return max(self.items // 5, 1) if name in ("prose", "summaries", *retrieval.NAMES) else self.items

    def made(self, tokenizer: Any) -> list[Task]:
        """The tasks; those that retrieve at every length.

        Raises:
            UsageError: for a package that is missing, or a file that cannot be used.

        """
        made: list[Task] = []
        for name in self.tasks:
            kind: Any = name
            if name in NAMES:
                made.append(bundled(kind, tokenizer, self.count(name), self.seed))
            else:
                far = self.lengths
                made += [retrieval.retrieval(kind, tokenizer, each, self.count(name), self.seed) for each in far]
        return made + [read_task(Path(file), tokenizer, self.items, self.seed) for file in self.data]


@dataclass(frozen=True)
class Key:
    """Names one result: what was done, at which layer (-1: nothing at all), and to which task."""

    name: str
    layer: int
    task: str


class Results(Journal):
    """The results in a folder."""

    def __init__(self, out: Path, header: dict[str, Any]) -> None:
        """Begin a folder, or go on in it; raises as a journal does."""
        super().__init__(out / RESULTS, header, ("name", "layer", "task"))

    @property
    def found(self) -> dict[Key, dict[str, Any]]:
        """What was found, by what it is of."""
        return {Key(row["name"], row["layer"], row["task"]): row for row in self.rows.values()}


def probe(source: Checkpoint, out: Path, settings: ProbeSettings) -> Results:
    """Run what is not yet in `out`; says on stderr how far it is.

    Raises:
        UsageError: for a model that cannot be read, tasks that cannot be had, or a folder of other results.

    """
    source.check_weights()
    tokenizer = read_tokenizer(source)
    tasks = settings.made(tokenizer)
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError("two tasks have one name; rename a file of --data")
    header = {
        "model": Path(source.name).name,
        "layers": source.num_layers,
        "settings": asdict(settings) | {"data": [Path(file).name for file in settings.data]},
        "tasks": {task.name: task.about for task in tasks},
        "versions": offline_versions(),
        "machine": f"{platform.machine()}, {'CUDA' if torch.cuda.is_available() else 'CPU'}",
    }
    results = Results(out, header)
    done = results.found
    keys = [key for key in _keys(tasks, source.num_layers, settings) if key not in done]
    if keys:
        _run(OfflineModel(source), tokenizer, tasks, keys, results, settings)
    return results


def _keys(tasks: Sequence[Task], num_layers: int, settings: ProbeSettings) -> Iterator[Key]:
    """All there is to do, from the lowest layer up."""
    for task in tasks:
        yield Key("none", -1, task.name)
    for layer in range(0, num_layers, settings.every):
        if any(task.score == "tokens" for task in tasks):
            yield Key("looks", layer, next(task.name for task in tasks if task.score == "tokens"))
        if "capitals" in settings.tasks:
            yield Key("injection", layer, "capitals")
        for name in settings.manipulations:
            for task in tasks:
                yield Key(name, layer, task.name)


def _run(
    model: OfflineModel,
    tokenizer: Any,
    tasks: Sequence[Task],
    keys: Sequence[Key],
    results: Results,
    settings: ProbeSettings,
) -> None:
    num_layers = len(model.layers)
    asked = {task.name: Evaluator(model, task, tokenizer) for task in tasks}
    pairs = (
        Pairs(model, tokenizer, settings.items, settings.seed) if any(key.name == "injection" for key in keys) else None
    )
    with progress() as bars:
        sizes = {task.name: task.tokens + (SUMMARY_TOKENS * 20 if task.score == "summaries" else 0) for task in tasks}
        total = sum(_work(key, sizes[key.task], num_layers) for key in keys)
        bar = bars.add_task("", total=total)
        for key in keys:
            bars.update(bar, description=f"layer {max(key.layer, 0)} of 0-{num_layers - 1}: {key.name}, {key.task}")
            if key.layer >= 0:
                for each in asked.values():
                    each.forget(key.layer)
            results.add(asdict(key) | _result(model, key, asked[key.task], pairs, settings.seed))
            bars.advance(bar, _work(key, sizes[key.task], num_layers))


def _work(key: Key, tokens: int, num_layers: int) -> int:
    """Tokens times layers; what is written has to pass through all of them."""
    return tokens * (num_layers - (0 if key.task == "summaries" else max(key.layer, 0)))


def _result(model: OfflineModel, key: Key, asked: Evaluator, pairs: Pairs | None, seed: int) -> dict[str, Any]:
    if key.name == "looks":
        entered = [each for _, each in asked.batches if each is not None]
        return asdict(attention_stats(model, key.layer, entered[:LOOKS_PASSAGES]))
    if key.name == "injection":
        assert pairs is not None
        return {"prompt": [], "injected": []} if not pairs.count else asdict(pairs.at(key.layer))
    if key.name == "none":
        return asdict(asked.manipulated(Manipulation(0)))
    name: Any = key.name
    return asdict(asked.manipulated(manipulation(name, key.layer, len(model.layers), seed)))
