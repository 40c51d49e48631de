"""`vllm-ext quality`: one model after another, and the report."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_executors.attention_plan import LayerPlan
from model_executors.heads.head_plan import Kind as HeadKind
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.progress import progress
from vllm_ext.quality.engine import Replies, reply_of
from vllm_ext.quality.report import STOCK, Figures, figures_of, show
from vllm_ext.quality.work import Settings, Work, prepare_work
from vllm_ext.reports.figures import is_right
from vllm_ext.serve import one_line, prepare
from vllm_ext.tasks import texts
from vllm_ext.versions import vllm_distribution


@dataclass(frozen=True)
class Candidate:
    """A model to measure."""

    name: str
    model: str
    changes: Mapping[int, LayerPlan] | None = None
    """A plan laid over it; None for the checkpoint as it is."""
    head: HeadKind | None = None
    agreement: float | None = None


def quality(
    model: str,
    candidates: Sequence[Candidate],
    settings: Settings,
    vllm_args: Sequence[str] = (),
    json_file: Path | None = None,
) -> None:
    """Measure and print the table.

    Raises:
        UsageError: as `measure` does.

    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: no such folder; create {json_file.parent}")
    figures = measure(model, candidates, settings, vllm_args)
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
    model: str, candidates: Sequence[Candidate], settings: Settings, vllm_args: Sequence[str] = ()
) -> dict[str, Figures]:
    """The figures of the stock `model`, under the name `stock`, and of each candidate.

    Raises:
        UsageError: for a model or a plan that does not fit, or an engine that does not start.

    """
    stock = Candidate(STOCK, model)
    prepared = {
        each.name: prepare(each.model, each.changes, vllm_args, each.head, each.agreement)
        for each in (stock, *candidates)
    }
    if len(prepared) <= len(candidates):
        raise UsageError(f"two of {', '.join(each.name for each in candidates)} have the same name; rename a folder")
    checkpoint, _ = prepared[STOCK]
    _check(checkpoint, [prepared[each.name][0] for each in candidates], settings)
    tokenizer = _tokenizer(model)
    work, right = prepare_work(tokenizer, settings)
    replies: dict[str, Replies] = {}
    with progress() as bars:
        task = bars.add_task("", total=work.tokens * len(prepared))
        for number, candidate in enumerate((stock, *candidates)):
            bars.update(task, description=f"{candidate.name} ({number + 1} of {len(prepared)})")
            opened, overrides = prepared[candidate.name]
            plan = opened.plan if candidate.changes is None else opened.planned(candidate.changes)
            frozen = plan is not None and plan.first_frozen < len(plan.layers)
            arguments = [*_engine_arguments(candidate.model, work), *vllm_args]
            replies[candidate.name] = reply_of(
                arguments, overrides, work, not frozen, lambda tokens: bars.advance(task, tokens)
            )
            bars.update(task, completed=work.tokens * (number + 1))
    scores = {
        name: {
            task: [
                float(is_right(task, tokenizer.decode(answer, skip_special_tokens=True), wanted))
                for answer, wanted in zip(answers, right[task], strict=True)
            ]
            for task, answers in each.generated.items()
        }
        for name, each in replies.items()
    }
    return {
        name: figures_of(each, replies[STOCK], scores[name], scores[STOCK], settings.seed, name == STOCK)
        for name, each in replies.items()
    }


def _check(checkpoint: Checkpoint, candidates: Sequence[Checkpoint], settings: Settings) -> None:
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
    if isinstance(longest, int) and max(settings.lengths) >= longest:
        raise UsageError(
            f"--length {max(settings.lengths)}: the model takes fewer than {longest} tokens; choose a shorter one"
        )


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)  # articles are long: no warnings
    except (OSError, ValueError) as error:
        raise UsageError(f"model {model}: no tokenizer is to be had ({one_line(error)}); add its files") from error


def _engine_arguments(model: str, work: Work) -> list[str]:
    """Options before the user's own: a start is not worth compiling for, and memory for logits stays small."""
    return [
        *("--model", model, "--skip-tokenizer-init", "--enforce-eager", "--no-async-scheduling"),
        *("--max-model-len", str(work.max_model_len), "--max-num-batched-tokens", "2048"),
    ]
