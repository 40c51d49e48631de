"""`vllm-ext quality`: one model after another, and the report."""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model_executors.attention_plan import LayerPlan
from model_executors.heads.head_plan import CHARACTER_HEADS, HeadKind
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.engine import Engine
from vllm_ext.errors import UsageError, one_line
from vllm_ext.folders import check_file
from vllm_ext.progress import progress
from vllm_ext.quality.kept import Kept
from vllm_ext.quality.report import STOCK, Figures, figures_of, show
from vllm_ext.quality.work import Asked, QualitySettings, Replies, Work, prepare_work
from vllm_ext.reports.figures import Scored, is_right
from vllm_ext.served import Served
from vllm_ext.tasks import texts
from vllm_ext.tasks.items import Task
from vllm_ext.versions import vllm_distribution


def candidates(
    model: str,
    planned: Sequence[str] = (),
    changes: Mapping[int, LayerPlan] | None = None,
    head: HeadKind | None = None,
    agreements: Sequence[float] = (),
    *,
    overlaid: str = "",
    vllm_args: Sequence[str] = (),
) -> dict[str, Served]:
    """What is measured beside the stock `model`, by name.

    Each planned checkpoint, once as it is and once at each agreement; and the model with a plan laid over it, or with a
    head of its own, under the name `overlaid`. A head that spells is for the planned checkpoints.

    Raises:
        UsageError: for options that nothing is there for, two of one name, or what does not fit.

    """
    spelling, own = (head, None) if head in CHARACTER_HEADS else (None, head)
    for option, value in (("--head", spelling), ("--agreement", next(iter(agreements), None))):
        if value is not None and not planned:
            raise UsageError(
                f"{option} {value}: it is for planned checkpoints with character heads; add --planned, or drop it"
            )
    found: dict[str, Served] = {}

    def add(name: str, served: Served) -> None:
        if name in found or name == STOCK:
            raise UsageError(f"two candidates have the same name, {name}; rename a folder")
        found[name] = served

    for folder in planned:
        add(Path(folder).name, Served.open(folder, None, spelling, vllm_args=vllm_args))
        for each in agreements:
            add(f"{Path(folder).name} at {each:g}", Served.open(folder, None, spelling, each, vllm_args=vllm_args))
    if changes is not None or own is not None:
        add(overlaid, Served.open(model, changes, own, vllm_args=vllm_args))
    return found


def quality(
    model: str,
    beside: Mapping[str, Served],
    settings: QualitySettings,
    vllm_args: Sequence[str] = (),
    json_file: Path | None = None,
) -> None:
    """Measure and print the table.

    Raises:
        UsageError: as `measure` does.

    """
    if json_file is not None:
        check_file("--json", json_file)
    kept = None if json_file is None else json_file.with_name(f"{json_file.stem}-replies")
    figures = measure(model, beside, settings, vllm_args, kept)
    report = {
        "model": Path(model).name,
        "vllm_args": list(vllm_args),
        "settings": asdict(settings),
        "prose": texts.prose_source(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "vllm": " ".join(vllm_distribution() or ("none",)),
        "figures": {name: asdict(each) for name, each in figures.items()},
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    show(report, figures)


def measure(
    model: str,
    beside: Mapping[str, Served],
    settings: QualitySettings,
    vllm_args: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Figures]:
    """The figures of the stock `model`, under the name `stock`, and of each candidate `beside` it.

    What each made of the work is kept in `folder` as it ends, and found there again.

    Raises:
        UsageError: for a model or a plan that does not fit, or an engine that does not start.

    """
    all_served = {STOCK: Served.open(model, vllm_args=vllm_args), **beside}
    _check(all_served[STOCK].checkpoint, [each.checkpoint for each in beside.values()], settings)
    tokenizer = _tokenizer(model)
    work, right = prepare_work(tokenizer, settings)
    replies: dict[str, Replies] = {}
    kept = Kept(folder)
    with progress() as bars:
        task = bars.add_task("", total=work.tokens * len(all_served))
        for number, (name, served) in enumerate(all_served.items()):
            bars.update(task, description=f"{name} ({number + 1} of {len(all_served)})")
            asked = Asked(served, [*engine_arguments(work), *vllm_args], work)
            found = kept.read(asked)
            if found is None:
                found = _reply(asked, lambda tokens: bars.advance(task, tokens))
                kept.write(asked, found)
            replies[name] = found
            bars.update(task, completed=work.tokens * (number + 1))
    scores = {
        name: {
            task: [
                float(is_right(task, tokenizer.decode(answer, skip_special_tokens=True), wanted))
                for answer, wanted in zip(answers, right[task], strict=True)
            ]
            for task, answers in each.generated.items()
        }
        | {task.name: scores_of(task, each.retrieved[task.name]) for task in work.retrieved}
        for name, each in replies.items()
    }
    return {
        name: figures_of(
            each, replies[STOCK], scores[name], scores[STOCK], work.retrieved, settings.seed, name == STOCK
        )
        for name, each in replies.items()
    }


def scores_of(task: Task, replies: Sequence[Scored]) -> list[float]:
    """As offline, item by item: whether all of an answer's tokens are the first choice, or what part of them is."""
    right = [np.equal(each.top, item.answer) for item, each in zip(task.items, replies, strict=True)]
    return [float(each.all() if task.score == "answers" else each.mean()) for each in right]


def _reply(asked: Asked, advance: Callable[[int], None]) -> Replies:
    """Do the work in a process of its own; `advance` is told of the tokens done.

    Raises:
        UsageError: where the engine does not start or does not finish.

    """
    with Engine("vllm_ext.quality.scoring:reply") as engine:
        engine.send(asked)
        while isinstance(message := engine.receive(), int):
            advance(message)
        assert isinstance(message, Replies)
        engine.receive()  # its end
    return message


def _check(checkpoint: Checkpoint, candidates: Sequence[Checkpoint], settings: QualitySettings) -> None:
    """Raise UsageError for models that cannot be measured so."""
    if checkpoint.plan is not None:
        raise UsageError(
            f"model {checkpoint.name}: it has an attention plan; give the stock model here and this as --planned"
        )
    for each in candidates:
        if each.config.get("vocab_size") != checkpoint.config.get("vocab_size"):
            raise UsageError(
                f"--planned {each.name}: its vocab_size is {each.config.get('vocab_size')}, the stock model's "
                f"{checkpoint.config.get('vocab_size')}; give a checkpoint made from {checkpoint.name}"
            )
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int):
        # A passage needs room for a token after it.
        retrieved = max(settings.task_lengths, default=0) if settings.tasks else 0
        for option, length, most in (
            ("--length", max(settings.lengths), longest - 1),
            ("--task-length", retrieved, longest),
        ):
            if length > most:
                raise UsageError(f"{option} {length}: the model takes {most} tokens at most; choose a shorter one")


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)  # articles are long: no warnings
    except (OSError, ValueError) as error:
        raise UsageError(f"model {model}: no tokenizer is to be had ({one_line(error)}); add its files") from error


def engine_arguments(work: Work) -> list[str]:
    """Options before the user's own: a start is not worth compiling for, and memory for logits stays small."""
    return [
        *("--skip-tokenizer-init", "--enforce-eager", "--no-async-scheduling"),
        *("--max-model-len", str(work.max_model_len), "--max-num-batched-tokens", "2048"),
    ]
