"""How a plan is searched for: which tasks, at which lengths, with how many items."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.errors import UsageError
from vllm_ext.tasks import retrieval, tasks
from vllm_ext.tasks.files import read_task
from vllm_ext.tasks.items import Split, Task

NEAR: dict[str, dict[Split, int]] = {
    "capitals": {"search": 32, "judge": 100},
    "sums": {"search": 24, "judge": 100},
    "reading": {"search": 16, "judge": 60},
    "prose": {"search": 6, "judge": 16},
}
"""Items of tasks that look little farther back than a window."""
SCANNED: tuple[retrieval.Name, ...] = ("needle", "needles")
"""What `--quick` scans layers with, and a search scans and searches with at every length."""
SEARCHED: tuple[retrieval.Name, ...] = (*SCANNED, "words", "facts")
"""What a search scans and searches with, words and facts at the longest length: a plan that finds every number can lose
half of these. The other tasks that retrieve are judged on."""
RETRIEVED: dict[Split, int] = {"search": 4, "judge": 40}
"""Items of what is searched with, at each length; to search with, texts, where several are asked for in one."""
QUICK = {"needle": 3, "needles": 4}
"""The same with `--quick`, which has three minutes; the four ask of one text."""
OTHERS = 16
"""Items of each other task that retrieves, at the longest length: where most lies before a window."""
OWN = 150
"""Items of a task of the user's own: a third to search with, the rest to judge on."""
WINDOWS = (256, 1_024)
"""A small one for layers that fetch nothing, and a large one for those that fetch a little: each more makes a search
much longer."""
SINKS = (4, 16)


@dataclass(frozen=True)
class SearchSettings:
    """How a plan is searched for.

    Raises:
        UsageError: for tasks that are not there, or sizes with which nothing could be found.

    """

    tasks: tuple[str, ...] = (*NEAR, *retrieval.NAMES)
    data: tuple[str, ...] = ()
    """Files with tasks of the user's own."""
    lengths: tuple[int, ...] = retrieval.LENGTHS
    """Tokens of the items of tasks that retrieve: what a plan is judged up to."""
    windows: tuple[int, ...] = WINDOWS
    """Sizes to try; those that no item is twice as long as are left out."""
    context: int = 4_096
    """Tokens of the requests for which savings are counted."""
    items: float = 1.0
    """How many items, as a part of the usual number."""
    seed: int = 0
    windows_only: bool = False
    """No layer frozen or skipped."""
    quick: bool = False
    """The scan alone, at the longest length but one: a plan of one window size, and no other tasks."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in (*NEAR, *retrieval.NAMES):
                known = ", ".join((*NEAR, *retrieval.NAMES))
                raise UsageError(f"--task {task}: there is none of that name; take {known}")
        if not self.tasks and not self.data:
            raise UsageError("no task; give --task or --data")
        if not self.windows or not self.lengths:
            raise UsageError("no window or no length; give --window and --length, or leave them out")
        for option, number in (
            ("--context", self.context),
            ("--items", self.items),
            *(("--window", size) for size in self.windows),
        ):
            if number <= 0:
                raise UsageError(f"{option} {number:g}: choose more than 0")
        for length in self.lengths:
            if length < retrieval.SHORTEST:
                least = retrieval.SHORTEST
                raise UsageError(f"--length {length}: too short to hide anything in; take {least} tokens or more")

    def made(self, tokenizer: Any, split: Split) -> list[Task]:
        """The tasks to search with, or to judge on; no item is in both.

        Raises:
            UsageError: for a file that cannot be used.

        """
        made: list[Task] = []
        searched = SCANNED if self.quick else SEARCHED
        for name in self.tasks:
            if name in NEAR:
                near: Any = name
                if not self.quick:
                    made.append(tasks.bundled(near, tokenizer, self._count(NEAR[name][split]), self.seed, split))
            elif name in searched or not {*self.tasks} & {*searched} or (split == "judge" and not self.quick):
                made += self._retrieving(name, tokenizer, split)
        return made + [self._own(Path(file), tokenizer, split) for file in self.data]

    def _retrieving(self, name: Any, tokenizer: Any, split: Split) -> list[Task]:
        lengths, count = sorted(self.lengths), RETRIEVED[split]
        if name not in SCANNED:
            lengths = lengths[-1:]
        if name not in SEARCHED:
            count = min(OTHERS, count)
        if self.quick and name in QUICK:
            lengths, count = lengths[:2][-1:], QUICK[name]
        elif split == "search":
            count *= retrieval.asked_of_a_text(name, split)
        return [
            retrieval.retrieval(name, tokenizer, length, self._count(count), self.seed, split) for length in lengths
        ]

    def _count(self, items: int) -> int:
        return max(round(items * self.items), 2)

    def _own(self, file: Path, tokenizer: Any, split: Split) -> Task:
        task = read_task(file, tokenizer, OWN, self.seed)
        if task.score == "summaries":
            raise UsageError(f"--data {file}: a search needs answers, and summaries have none; give prompts with them")
        if len(task.items) < 3:
            raise UsageError(f"--data {file}: it has {len(task.items)} items; give 3 or more, the more the better")
        third = len(task.items) // 3
        return task.of(task.items[:third] if split == "search" else task.items[third:])
