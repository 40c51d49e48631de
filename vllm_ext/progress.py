"""How far something is that takes long, on stderr, with an estimate."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10
SPEED_SECONDS = 600
"""How long a speed is estimated over: some steps take half a minute, and rich's own half forgets what was before."""


class _Lines(Progress):
    """In a pipe or a log a bar cannot be redrawn: a line there, for each new description and else now and then."""

    told = 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        self._tell(task_id, "description" in fields)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID, anew: bool = False) -> None:
        if not (anew or time.monotonic() - self.told >= LINE_SECONDS):
            return
        self.told = time.monotonic()
        task = next(each for each in self.tasks if each.id == task_id)
        left = "" if task.time_remaining is None else f", some {task.time_remaining:.0f} s left"
        line = f"{task.description}: {task.percentage:.0f}%, {task.elapsed or 0:.0f} s gone{left}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress() -> Progress:
    """A bar for each task, after its description."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    made = Progress if console.is_terminal else _Lines
    return made(*columns, console=console, speed_estimate_period=SPEED_SECONDS)
