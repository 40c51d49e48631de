"""`vllm-ext bench`: what is measured beside what, and the shape that ideals are worked out from."""

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.heads.head_plan import SPELLING, HeadPlan
from model_executors.heads.head_plan import Kind as HeadKind
from vllm_ext.bench import machine
from vllm_ext.bench.ideal import Shape
from vllm_ext.bench.report import Row, report, rows, show
from vllm_ext.bench.run import Candidate, Settings, rounds
from vllm_ext.bench.shapes import write_shape, write_spelled_shape
from vllm_ext.bench.work import Work
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.offline.model import read_tokenizer
from vllm_ext.serve import head_plan, prepare
from vllm_ext.tasks.texts import prose
from vllm_ext.versions import vllm_problem

BLOCK = 128
"""Tokens of a block of the KV cache on a CPU."""
DUMMY = ("--load-format", "dummy")
UNTOKENIZED = ("--skip-tokenizer-init",)  # prompts are token ids


@dataclass(frozen=True)
class Variant:
    """What is measured beside stock."""

    described: str
    """By the options that name it."""
    changes: Mapping[int, LayerPlan] | None = None
    """A plan laid over the stock checkpoint."""
    folder: str | None = None
    """A planned checkpoint."""
    head: HeadKind | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Pair:
    """Stock and variant, ready to be measured."""

    name: str
    candidates: Mapping[str, Candidate]
    shape: Shape
    plan: AttentionPlan
    heads: tuple[HeadPlan, HeadPlan]


def pair(
    model: str | None, shape: str | None, variant: Variant, settings: Settings, args: Sequence[str], scratch: Path
) -> Pair:
    """Check the two.

    Raises:
        UsageError: for a model or plan that is missing, damaged or does not fit.

    """
    if (model is None) == (shape is None):
        raise UsageError("bench needs either a MODEL or a --shape; give one of them")
    if shape is not None:
        if variant.folder is not None:
            raise UsageError(f"--planned {variant.folder}: a --shape has no checkpoint; use --skip, --window, --freeze")
        if variant.head in SPELLING:
            if variant.changes is not None:
                raise UsageError(
                    f"--shape with --head {variant.head}: measure a plan's layers by themselves; drop the layers"
                )
            model, folder = map(str, write_spelled_shape(shape, scratch))
        else:
            model = folder = str(write_shape(shape, scratch / "stock"))
            if variant.changes is not None:
                folder = str(write_shape(shape, scratch / "planned", variant.changes))
            args = [*args, *DUMMY]
        variant = Variant(variant.described, None, folder, variant.head, variant.agreement)
    assert model is not None
    args = [*args, *UNTOKENIZED]
    stock, _ = prepare(model, None, args)
    if not any(each.startswith("--max-model-len") for each in args):
        args = [*args, "--max-model-len", str(_max_model_len(stock, settings))]
    served = variant.folder or model
    opened, overrides = prepare(served, variant.changes, args, variant.head, variant.agreement)
    if variant.folder is not None and shape is None and opened.plan is None:
        raise UsageError(f"--planned {variant.folder}: it has no attention plan; write one with vllm-ext plan")
    plan = opened.plan if variant.changes is None else opened.planned(variant.changes)
    heads = (HeadPlan(), head_plan(opened, variant.head, variant.agreement))
    given = _prose(stock) if 0 < heads[1].threshold < 1 else ()  # on random tokens all rows would be unsure
    return Pair(
        shape or Path(model).name,
        {"stock": Candidate(model, {}, args, given), "variant": Candidate(served, overrides, args, given)},
        shape_of(stock),
        plan or AttentionPlan.of(stock.num_layers),
        heads,
    )


def _prose(stock: Checkpoint) -> Sequence[int]:
    """Held-out prose, in the checkpoint's tokens."""
    ids = read_tokenizer(stock)(prose("held_out"), add_special_tokens=False, verbose=False).input_ids
    return list(itertools.chain.from_iterable(ids))


def _max_model_len(stock: Checkpoint, settings: Settings) -> int:
    """Enough for all work, in whole blocks of the KV cache where the model takes so many."""
    largest, needed = "", 0
    for text in settings.work:
        if (tokens := Work.parse(text).longest(settings.repeats)) > needed:
            largest, needed = text, tokens
    taken = stock.config.get("max_position_embeddings") or needed + BLOCK
    if needed > taken:
        raise UsageError(
            f"--work {largest}: its requests grow to {needed} tokens, and the model takes {taken}; choose less"
        )
    return min(taken, -(-needed // BLOCK) * BLOCK)


def shape_of(stock: Checkpoint) -> Shape:
    """The checkpoint's shape; what its elements take is known when an engine has chosen."""
    from transformers import AutoConfig

    return Shape.of(AutoConfig.from_pretrained(stock.folder or stock.name), stock.family)


def bench(
    model: str | None,
    shape: str | None,
    variant: Variant,
    settings: Settings,
    args: Sequence[str],
    json_file: Path | None,
) -> None:
    """Measure, print the table, and the JSON as the last line.

    Raises:
        UsageError: as `pair` does, and where an engine does not start.

    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: no such folder; create {json_file.parent}")
    if problem := vllm_problem():
        raise UsageError(problem)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-bench-") as scratch:
        found, made = measure(model, shape, variant, settings, args, Path(scratch))
    show(made, found)
    text = json.dumps(made)
    if json_file is not None:
        json_file.write_text(text + "\n")
    print(text)


def measure(
    model: str | None, shape: str | None, variant: Variant, settings: Settings, args: Sequence[str], scratch: Path
) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and all of it for JSON; raises as `pair` does."""
    two = pair(model, shape, variant, settings, args, scratch)
    measured = rounds(two.candidates, settings)
    shape_served = replace(two.shape, element_bytes=measured["stock"][0].element_bytes)
    roof = machine.measured(shape_served.element_bytes)
    found = rows(measured, shape_served, two.plan, two.heads, roof, settings)
    told = {key: value for key, value in asdict(settings).items() if key != "work"} | {"vllm_args": list(args)}
    return found, report(two.name, variant.described, found, measured, roof, told)
