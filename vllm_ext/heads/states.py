"""The states that heads are trained on: what a model makes of passages, kept on disk.

Of each token lie there what leaves the unchanged model's last layer, from which the teacher's logits follow, and what
enters the first of the layers that are trained, where there are any.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_ext.offline.model import Fitted, OfflineModel, PlannedModel, Plans
from vllm_ext.progress import progress

PASSAGES_AT_ONCE = 4
DONE = "states.json"
FILE = "states.bin"


@dataclass(frozen=True)
class StudentLayers:
    """What of a model the student runs before its head."""

    layers: int = 0
    """How many of the top layers; they are trained."""
    plans: Plans | None = None
    """The student's attention plan."""
    fitted: Fitted | None = None


@dataclass(frozen=True)
class States:
    """`[passages, length, kinds, hidden_size]`, mapped from a file; `kinds` is 2 where layers are trained, else 1."""

    tensor: torch.Tensor

    @property
    def leaving(self) -> torch.Tensor:
        """`[passages, length, hidden_size]`: what leaves the teacher's last layer."""
        return self.tensor[:, :, 0]

    @property
    def entering(self) -> torch.Tensor:
        """`[passages, length, hidden_size]`: what enters the student where it is trained."""
        return self.tensor[:, :, -1]


def collect(
    model: OfflineModel,
    passages: torch.Tensor,
    folder: Path,
    part: StudentLayers,
) -> States:
    """The states of `passages` `[passages, length]`; an interrupted collection goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds, hidden_size = 1 + (part.layers > 0), model.decoder.config.hidden_size
    shape = (*passages.shape, kinds, hidden_size)
    progress_file = folder / DONE
    done = json.loads(progress_file.read_text())["passages"] if progress_file.is_file() else 0
    numbers = torch.Size(shape).numel()
    file = torch.from_file(str(folder / FILE), shared=True, size=numbers, dtype=model.model.dtype).view(shape)
    with progress() as bars:
        bar = bars.add_task("states", total=len(passages), completed=done)
        while done < len(passages):
            some = passages[done : done + PASSAGES_AT_ONCE]
            file[done : done + len(some)] = _states(model, some, part).cpu()
            done += len(some)
            progress_file.write_text(json.dumps({"passages": done}))
            bars.update(bar, completed=done)
    return States(file)


@torch.no_grad()
def _states(model: OfflineModel, passages: torch.Tensor, part: StudentLayers) -> torch.Tensor:
    """`[passages, length, kinds, hidden_size]`"""
    entered = model.enter(passages.to(model.device))
    kept: list[torch.Tensor] = []
    if part.layers:
        changed, entering = PlannedModel(model, part.plans, part.fitted), entered.states[0]
        for number in range(len(model.layers) - part.layers):
            entering = changed.layer(number, entering, entered)
        kept = [entering]
    return torch.stack([entered.state(model, len(model.layers)), *kept], 2)


def rows(states: States, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by their number: `[rows, hidden_size]` each, entering and leaving."""
    flat = states.tensor.flatten(0, 1)[which]
    return flat[:, -1], flat[:, 0]
