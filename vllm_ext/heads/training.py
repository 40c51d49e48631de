"""Self-distillation: a student learns the next-token distribution of the model that it was (*SpeLLM*, section 4).

The loss is the divergence of the student's distribution, normalised over the vocabulary, from the teacher's; or each
place's cross-entropy by itself, to compare.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from vllm_ext.errors import UsageError
from vllm_ext.heads.states import States, rows
from vllm_ext.heads.student import Student
from vllm_ext.offline.model import Activations, OfflineModel
from vllm_ext.progress import progress

Loss = Literal["vocabulary", "places"]
CURVE = "curve.jsonl"
SAVED = "saved"
STEPS = "steps.json"
CLIPPED = 1.0
"""The longest gradient."""
LOGGED_EVERY = 20
"""Steps."""
WARM_UP = 0.03
"""The part of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a student is trained.

    Raises:
        UsageError: for numbers that are none of these.

    """

    steps: int = 2_000
    batch: int = 512
    """Tokens of a step, over all processes."""
    learning_rate: float = 2e-3
    noise: float = 0.0
    """Of the states, as a part of their standard deviation: the teacher's answer to a noisy state is exact too."""
    temperature: float = 1.0
    """Of the teacher: below 1, its best tokens count more, so the student agrees on them more often and is less alike
    as a distribution."""
    loss: Loss = "vocabulary"
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulation: int = 1
    """Batches of a step."""
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose 1 or more")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name):g}: choose a positive number")


@dataclass(frozen=True)
class Batch:
    """`[rows, hidden_size]`, or `[passages, length, hidden_size]` where the trained layers attend."""

    entering: torch.Tensor
    leaving: torch.Tensor
    entered: Activations | None = None


class Batches:
    """The batch of each step, by its number alone, so that a resumed run sees what an unbroken one does.

    Tokens are drawn one by one, or passages where the trained layers attend; of every epoch each is drawn once.
    """

    def __init__(self, student: Student, states: States, passages: torch.Tensor, settings: TrainingSettings) -> None:
        self.student, self.states, self.passages, self.settings = student, states, passages, settings
        self.size = settings.batch // (1 if student.pointwise else passages.shape[1])
        self.number = passages.numel() if student.pointwise else len(passages)
        if not 1 <= self.size <= self.number:
            raise UsageError(
                f"--batch {settings.batch}: the text makes {passages.numel():,} tokens in passages of "
                f"{passages.shape[1]}; choose {1 if student.pointwise else passages.shape[1]} to {passages.numel()}"
            )
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        """`share` is which process asks, and of how many: each gets its own rows."""
        epoch, part = divmod(step, self.number // self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.settings.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.number, generator=generator)
        which = self.order[part * self.size : (part + 1) * self.size][share[0] :: share[1]]
        device = self.student.model.device
        if not self.student.pointwise:
            entered = self.student.model.enter(self.passages[which].to(device))
            return Batch(self.states.entering[which].to(device), self.states.leaving[which].to(device), entered)
        entering, leaving = (state.to(device) for state in rows(self.states, which))
        if self.settings.noise and not self.student.part.layers:
            generator = torch.Generator().manual_seed((self.settings.seed << 32) + step * share[1] + share[0])
            noise = torch.randn(leaving.shape, generator=generator).to(leaving)
            entering = leaving = leaving + self.settings.noise * leaving.std(0) * noise
        return Batch(entering, leaving)


def loss_of(student: nn.Module, model: OfflineModel, batch: Batch, settings: TrainingSettings) -> torch.Tensor:
    """Nats a token: the divergence from the teacher, or the cross-entropy of its top token's places, summed."""
    leaving = batch.leaving.flatten(0, -2)
    if settings.loss == "vocabulary":
        return student(batch.entering, batch.entered, leaving=leaving, temperature=settings.temperature)
    with torch.no_grad():
        best = torch.cat([logits.argmax(-1) for logits in model.logits(leaving)])
    return -student(batch.entering, batch.entered, tokens=best).mean()


def rate(step: int, steps: int) -> float:
    """The learning rate as a part of the highest: it rises evenly, and falls as a cosine does."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def begun(file: Path, settings: dict[str, Any]) -> None:
    """Write what a run was begun with.

    Raises:
        UsageError: where another one was begun there.

    """
    written = json.dumps(settings, indent=1, default=str, sort_keys=True)
    if file.is_file() and file.read_text(encoding="utf-8") != written:
        raise UsageError(
            f"{file}: a run with other settings was begun there; use those, or remove the file and its run"
        )
    file.write_text(written, encoding="utf-8")


def train(student: Student, states: States, passages: torch.Tensor, settings: TrainingSettings, out: Path) -> None:
    """Train for `settings.steps`; goes on from what is saved in `out`, where the curve and TensorBoard's files are too.

    `passages` `[passages, length]` are the tokens that the states are of.

    Raises:
        UsageError: for a batch larger than the text, or smaller than a passage where whole ones are needed.

    """
    batches = Batches(student, states, passages, settings)
    accelerator = Accelerator(
        cpu=student.model.device.type == "cpu",
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        log_with="tensorboard",
        project_dir=out,
    )
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, settings.steps))
    running, optimizer = accelerator.prepare(student, adam)
    accelerator.register_for_checkpointing(schedule)
    accelerator.init_trackers("heads", asdict(settings))
    share = (accelerator.process_index, accelerator.num_processes)
    saved, done = out / SAVED, 0
    begun(out / "training.json", asdict(settings))
    if (saved / STEPS).is_file():
        accelerator.load_state(str(saved))
        done = json.loads((saved / STEPS).read_text())["steps"]
    with progress() as bars:
        bar = bars.add_task("training", total=settings.steps, completed=done)
        for step in range(done, settings.steps):
            losses = []
            for part in range(settings.accumulation):
                with accelerator.accumulate(running):
                    batch = batches(step * settings.accumulation + part, share)
                    loss = loss_of(running, student.model, batch, settings)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, CLIPPED)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
            schedule.step()
            last, mean = step + 1 == settings.steps, sum(losses) / len(losses)
            bars.update(bar, advance=1, description=f"training, {mean:.3f} nats")
            if accelerator.is_main_process and (step % LOGGED_EVERY == 0 or last):
                accelerator.log({"loss": mean, "learning_rate": schedule.get_last_lr()[0]}, step)
                with (out / CURVE).open("a") as curve:
                    curve.write(json.dumps({"step": step, "loss": mean}) + "\n")
            if (step + 1) % settings.save_every == 0 or last:
                accelerator.save_state(str(saved))
                if accelerator.is_main_process:
                    (saved / STEPS).write_text(json.dumps({"steps": step + 1}))
    if accelerator.num_processes > 1:
        accelerator.end_training()  # it ends every process group, also those that others made in this process
    for tracker in accelerator.trackers:
        tracker.finish()
