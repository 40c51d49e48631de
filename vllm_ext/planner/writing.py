"""A plan written into a checkpoint: what it needs is fitted first, and what it was judged by goes with it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_executors.attention_plan import AttentionPlan
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.folders import check_space
from vllm_ext.planned_checkpoint import write_planned
from vllm_ext.planner.judge import Goal, Judged
from vllm_ext.planner.report import read


@dataclass(frozen=True)
class Calibration:
    """The text that what a plan needs is fitted on."""

    text: Path | None = None
    """A file or a folder; None for prose out of a package."""
    tokens: int = 32_768
    length: int = 1_024
    """Tokens of each passage."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < self.length:
            raise UsageError(
                f"--tokens {self.tokens} is less than one passage of {self.length}; raise it, or lower --length"
            )


def write_plan(
    checkpoint: Checkpoint,
    plan: AttentionPlan,
    out: Path,
    calibration: Calibration | None = None,
    judged: Mapping[str, Any] | None = None,
) -> None:
    """Fit what the plan needs, which takes minutes for a small model, and write the checkpoint `out`.

    Raises:
        UsageError: for weights or text that do not do.

    """
    from vllm_ext.offline.fit import fit
    from vllm_ext.tasks.passages import read_texts
    from vllm_ext.tasks.texts import prose, prose_source

    checkpoint.check_weights()
    check_space(out, checkpoint.files)
    made = None
    if plan.fitted:
        on = calibration or Calibration()
        texts = prose("calibration") if on.text is None else read_texts(on.text)
        name = prose_source() if on.text is None else on.text.name
        made = fit(checkpoint, plan, texts, name=name, tokens=on.tokens, length=on.length, seed=on.seed)
    write_planned(checkpoint, plan, out, made, judged=judged)


def choose(checkpoint: Checkpoint, front: Path, goal: Goal, out: Path) -> Judged:
    """Write the plan of an earlier search that meets the goal; returns it.

    Raises:
        UsageError: for a front of another model, or a goal that none of its plans meets.

    """
    found = read(front)
    theirs = f"{found.header['model']} of {found.header['layers']} layers"
    ours = f"{checkpoint.called} of {checkpoint.num_layers} layers"
    if theirs != ours:
        raise UsageError(f"{front}: it is of {theirs}, and this is {ours}; search this model first")
    judged = goal.choose(found.plans)
    record = {
        "lengths": sorted({each["length"] for each in found.header["tasks"].values() if each["length"] is not None}),
        "kv_saved": round(judged.kv_saved, 4),
        "context": found.header["settings"]["context"],
        "kept": round(judged.kept, 4),
        "tasks": {name: figure.ratio and round(figure.ratio, 4) for name, figure in judged.tasks.items()},
        "front_sha256": hashlib.sha256(front.expanduser().read_bytes()).hexdigest(),
    }
    length = min(Calibration.length, checkpoint.config.get("max_position_embeddings") or Calibration.length)
    write_plan(checkpoint, checkpoint.planned(judged.changes), out, Calibration(length=length), record)
    return judged
