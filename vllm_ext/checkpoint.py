"""Checkpoint folders: found, checked without reading the weights, and written anew with a plan."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from model_executors.attention_plan import ARCHITECTURE_PREFIX, CONFIG_KEY, AttentionPlan
from model_executors.families import Family, family_of
from vllm_ext.errors import UsageError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# Weights in formats that a planned checkpoint has no use for.
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot"}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint: its name as the user gave it, and its configuration."""

    name: str
    config: dict[str, Any]
    folder: Path | None
    """Where it lies; None for a hub name whose weights were not asked for."""

    @classmethod
    def open(cls, model: str, *, weights: bool) -> Self:
        """Find a folder or a hub name; with `weights`, download a hub's weights too.

        Raises:
            UsageError: where there is neither, or the configuration cannot be read.

        """
        folder = Path(model).expanduser()
        if folder.is_dir():
            if not (folder / CONFIG).is_file():
                raise UsageError(f"model {model}: no {CONFIG} in that folder; give a Hugging Face checkpoint's folder")
            return cls(model, _read_json(folder / CONFIG), folder)
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise UsageError(f"model {model}: no such folder; give a checkpoint's folder or a hub name")
        return cls._from_hub(model, weights)

    @classmethod
    def _from_hub(cls, model: str, weights: bool) -> Self:
        from huggingface_hub import hf_hub_download, snapshot_download

        try:
            if weights:
                folder = Path(snapshot_download(model, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))
                return cls(model, _read_json(folder / CONFIG), folder)
            return cls(model, _read_json(Path(hf_hub_download(model, CONFIG))), None)
        except UsageError:
            raise
        except Exception as error:  # the hub's client raises many kinds; to the user they are one
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"model {model}: neither a folder nor to be had from a model hub ({reason}); give a checkpoint's folder"
            ) from error

    @property
    def architecture(self) -> str:
        """The first of the configuration's architectures."""
        architectures = self.config.get("architectures") or [None]
        if not isinstance(architectures[0], str):
            raise UsageError(f"model {self.name}: {CONFIG} names no architectures; add the model's class name there")
        return architectures[0]

    @property
    def family(self) -> Family:
        """The architecture's row; raises UsageError where there is none."""
        try:
            return family_of(self.architecture)
        except ValueError as error:
            raise UsageError(f"model {self.name}: {error}") from error

    @property
    def num_layers(self) -> int:
        """How many decoder layers the configuration states."""
        layers = self.config.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 1:
            raise UsageError(f"model {self.name}: num_hidden_layers is {layers!r}; it must be a positive number")
        return layers

    @property
    def plan(self) -> AttentionPlan | None:
        """The plan it was written with, or None for a stock checkpoint.

        Raises:
            UsageError: for a plan that does not fit the model.

        """
        if CONFIG_KEY not in self.config and not self.architecture.startswith(ARCHITECTURE_PREFIX):
            return None  # of whatever family: vLLM serves it as it is
        expected = self.family.planned_architecture
        if self.architecture != expected:
            raise UsageError(
                f"model {self.name}: {CONFIG} has {CONFIG_KEY!r} but architecture {self.architecture}; "
                f"set it to {expected}"
            )
        try:
            return AttentionPlan.from_config(self.config.get(CONFIG_KEY), self.num_layers)
        except ValueError as error:
            raise UsageError(f"model {self.name}: {error}") from error

    def planned(self, skip: list[int]) -> AttentionPlan:
        """A plan for this stock checkpoint.

        Raises:
            UsageError: for layers it does not have, for all of them, a family without a row, or a planned checkpoint.

        """
        if self.plan is not None:
            raise UsageError(f"model {self.name}: it has an attention plan already; plan the stock checkpoint instead")
        try:
            family_of(self.architecture)
            return AttentionPlan.skipping(skip, self.num_layers)
        except ValueError as error:
            raise UsageError(f"model {self.name}: {error}") from error

    def overrides(self, plan: AttentionPlan) -> dict[str, Any]:
        """What makes this stock checkpoint a planned one: keys of `config.json`, or of vLLM's `--hf-overrides`."""
        return {"architectures": [self.family.planned_architecture], CONFIG_KEY: plan.to_config()}

    @cached_property
    def tensors(self) -> dict[str, list[str]]:
        """The tensors' names in each weight file, by the file's name, after checking that the files are whole.

        Raises:
            UsageError: where a file is missing, truncated or not safetensors.

        """
        assert self.folder is not None
        if (self.folder / INDEX).is_file():
            files = sorted(set(_read_json(self.folder / INDEX).get("weight_map", {}).values()))
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"model {self.name}: no *.safetensors weights in that folder; convert or download them")
        return {name: self._tensors_in(name) for name in files}

    def check_weights(self) -> None:
        """Read every weight file's header; raises as `tensors` does."""
        _ = self.tensors

    def _tensors_in(self, file: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        assert self.folder is not None
        try:
            with safe_open(
                self.folder / file, framework="pt"
            ) as weights:  # reads the header, checks it against the size
                return list(weights.keys())
        except FileNotFoundError:
            raise UsageError(f"model {self.name}: weight file {file} is missing; download it again") from None
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"model {self.name}: weight file {file} is damaged ({error}); download it again"
            ) from error


def write_planned(source: Checkpoint, plan: AttentionPlan, out: Path) -> None:
    """Write a planned checkpoint: weight files without the skipped tensors, all else linked or copied.

    The folder appears under its name only when it is complete.

    Raises:
        UsageError: where `out` exists or the source's weights are not whole.

    """
    assert source.folder is not None
    if out.exists():
        raise UsageError(f"--out {out}: it exists already; choose another folder or remove it")
    with complete_folder(out) as building:
        dropped = _write_weights(source, plan, building)
        for path in source.folder.iterdir():
            done = path.name in (CONFIG, INDEX) or path.suffix == ".safetensors"
            if path.is_file() and not done and path.suffix not in OTHER_WEIGHTS:
                _link_or_copy(path, building / path.name)
        overrides = source.overrides(plan)
        overrides[CONFIG_KEY] |= {"made_by": f"vllm-ext {version('vllm-ext')}", "tensors_left_out": dropped}
        (building / CONFIG).write_text(json.dumps(source.config | overrides, indent=2) + "\n")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to build in, beside `folder`, that takes its name when all went well and is removed otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    building.chmod(0o755)
    try:
        yield building
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_weights(source: Checkpoint, plan: AttentionPlan, out: Path) -> int:
    """Write the weight files and their index; returns how many tensors were left out."""
    from rich.console import Console
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
            if len(kept) == len(names):
                _link_or_copy(source.folder / file, out / file)
            elif kept:
                save_file({name: weights.get_tensor(name) for name in kept}, out / file, weights.metadata())
    if (source.folder / INDEX).is_file():
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    return sum(map(len, source.tensors.values())) - len(weight_map)


def _link_or_copy(source: Path, target: Path) -> None:
    source = source.resolve()  # a hub's cache holds links
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds no JSON object; download it again")
    return content
