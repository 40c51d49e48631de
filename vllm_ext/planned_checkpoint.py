"""Planned checkpoints: a stock one written anew with a plan, its fitted tensors, and its heads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from model_executors.attention_plan import CONFIG_KEY, AttentionPlan
from model_executors.heads.head_plan import HeadPlan
from vllm_ext.checkpoint import CONFIG, INDEX, OTHER_WEIGHTS, Checkpoint
from vllm_ext.folders import as_readable, check_out, check_space, complete_folder, place

if TYPE_CHECKING:  # it needs torch, which takes seconds to load
    import torch

FITTED = "vllm_ext.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
"""One of these is in each folder that has a tokenizer."""


@dataclass(frozen=True)
class Fit:
    """What was fitted: the tensors by their names in a checkpoint, on the CPU, and what they were fitted on."""

    tensors: "dict[str, torch.Tensor]"
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What self-distillation made: the head, its tensors by their names in a checkpoint, and how it was trained."""

    head: HeadPlan
    tensors: "dict[str, torch.Tensor]"
    replaced: "dict[str, torch.Tensor]"
    """Weights that were trained further, by the names that the model's own have."""
    provenance: dict[str, Any]


def write_planned(
    source: Checkpoint,
    plan: AttentionPlan,
    out: Path,
    fit: Fit | None = None,
    trained: Trained | None = None,
    judged: Mapping[str, Any] | None = None,
) -> None:
    """Write a planned checkpoint: weight files without the skipped tensors, those fitted and trained, and all
    else cloned or copied.

    The folder appears under its name only when it is complete. `judged` says what the plan was judged by.

    Raises:
        UsageError: where `out` exists or cannot be written, or the source's weights are not whole.

    """
    from safetensors.torch import save_file

    assert source.folder is not None
    assert source.fitted_shapes(plan).keys() == (fit.tensors.keys() if fit is not None else set())
    check_out(out)
    source.check_windows(plan)
    check_space(out, source.files)
    if not any((source.folder / name).is_file() for name in TOKENIZERS):
        told = Console(stderr=True, highlight=False, soft_wrap=True)
        told.print(f"{source.name} has no tokenizer, and so has {out}; give vLLM one with --tokenizer", markup=False)
    changed = source.changed_config(plan)
    added: dict[str, torch.Tensor] = {}
    with complete_folder(out) as building:
        weight_map, dropped = _write_weights(source, plan, building, trained.replaced if trained is not None else {})
        changed[CONFIG_KEY] |= {"made_by": f"vllm-ext {version('vllm-ext')}", "tensors_left_out": dropped}
        if fit is not None:
            added |= fit.tensors
            changed[CONFIG_KEY]["fit"] = fit.provenance
        if trained is not None:
            added |= trained.tensors
            changed[CONFIG_KEY] |= {"head": trained.head.to_config(), "training": trained.provenance}
        if judged is not None:
            changed[CONFIG_KEY]["judged"] = dict(judged)
        if added:
            save_file(added, building / FITTED, {"format": "pt"})
            as_readable(building / FITTED, source.folder / CONFIG)
            weight_map |= dict.fromkeys(added, FITTED)
        if (source.folder / INDEX).is_file():
            (building / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
        for path in source.folder.iterdir():
            done = path.name in (CONFIG, INDEX) or path.suffix == ".safetensors"
            if path.is_file() and not done and path.suffix not in OTHER_WEIGHTS:
                place(path, building / path.name)
        (building / CONFIG).write_text(json.dumps(source.config | changed, indent=2) + "\n")


def _write_weights(
    source: Checkpoint, plan: AttentionPlan, out: Path, replaced: "Mapping[str, torch.Tensor]"
) -> tuple[dict[str, str], int]:
    """Write the weight files; returns in which of them each tensor is, and how many tensors were left out."""
    from rich.progress import track
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert source.folder is not None
    skipped = set(plan.skipped)
    weight_map: dict[str, str] = {}
    for file, names in track(source.tensors.items(), "weights", console=Console(stderr=True), transient=True):
        kept = [name for name in names if not source.family.drops(name, skipped)]
        weight_map |= dict.fromkeys(kept, file)
        with safe_open(source.folder / file, framework="pt") as weights:
            if len(kept) == len(names) and not replaced.keys() & set(names):
                place(source.folder / file, out / file)
            elif kept:
                tensors = {name: replaced.get(name, weights.get_tensor(name)) for name in kept}
                save_file(tensors, out / file, weights.metadata())
                as_readable(out / file, source.folder / file)
    return weight_map, sum(map(len, source.tensors.values())) - len(weight_map)
