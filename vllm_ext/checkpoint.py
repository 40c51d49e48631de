"""Checkpoint folders: found, and checked without reading the weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from model_executors.attention_plan import (
    ARCHITECTURE_PREFIX,
    CONFIG_KEY,
    AttentionPlan,
    LayerPlan,
    tensor_name,
    tensors_of,
)
from model_executors.families import Family, family_of, own_window
from model_executors.heads.head_plan import HeadPlan, head_tensor_name
from vllm_ext.errors import UsageError
from vllm_ext.folders import read_json

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
        gguf = folder if folder.suffix == ".gguf" and folder.is_file() else next(folder.glob("*.gguf"), None)
        if gguf is not None and not (folder / CONFIG).is_file():
            cure = f"make a checkpoint of it: vllm-ext model convert {gguf} --to FOLDER"
            raise UsageError(f"model {model}: {gguf.name} is a GGUF file; {cure}")
        if folder.is_dir():
            if not (folder / CONFIG).is_file():
                raise UsageError(f"model {model}: no {CONFIG} in that folder; give a Hugging Face checkpoint's folder")
            return cls(model, read_json(folder / CONFIG), folder)
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise UsageError(f"model {model}: no such folder; give a checkpoint's folder or a hub name")
        return cls._from_hub(model, weights)

    @classmethod
    def _from_hub(cls, model: str, weights: bool) -> Self:
        from huggingface_hub import hf_hub_download, snapshot_download

        try:
            if weights:
                folder = Path(snapshot_download(model, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))
                return cls(model, read_json(folder / CONFIG), folder)
            return cls(model, read_json(Path(hf_hub_download(model, CONFIG))), None)
        except UsageError:
            raise
        except Exception as error:  # the hub's client raises many kinds; to the user they are one
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"model {model}: neither a folder nor to be had from a model hub ({reason}); give a checkpoint's folder"
            ) from error

    @property
    def called(self) -> str:
        """The last part of its name."""
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def architecture(self) -> str:
        """The first of the configuration's architectures."""
        architectures = self.config.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
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
        if type(layers) is not int or layers < 1:
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

    @property
    def head(self) -> HeadPlan:
        """The head that it was written with.

        Raises:
            UsageError: for a head that cannot be.

        """
        try:
            section = self.config.get(CONFIG_KEY)
            return HeadPlan.from_config(section.get("head") if isinstance(section, dict) else None)
        except ValueError as error:
            raise UsageError(f"model {self.name}: {error}") from error

    def planned(self, changes: Mapping[int, LayerPlan]) -> AttentionPlan:
        """A plan for this stock checkpoint: attention in full but for `changes`, by layer.

        Raises:
            UsageError: for layers it does not have, a plan that cannot be, a family without a row, or a planned
                checkpoint.

        """
        if self.plan is not None:
            raise UsageError(f"model {self.name}: it has an attention plan already; plan the stock checkpoint instead")
        for layer, plan in changes.items():
            for kind in (plan.kind, "window" if plan.window is not None else plan.kind):
                if kind not in self.family.kinds:
                    raise UsageError(
                        f"model {self.name}: layer {layer} cannot be {kind} in {self.architecture}; "
                        f"use one of {', '.join(self.family.kinds)}"
                    )
        try:
            return AttentionPlan.of(self.num_layers, changes)
        except ValueError as error:
            raise UsageError(f"model {self.name}: {error}") from error

    def overrides(self, plan: AttentionPlan) -> dict[str, Any]:
        """What makes this stock checkpoint a planned one through vLLM's `--hf-overrides`.

        Raises:
            UsageError: for a plan that needs fitted tensors.

        """
        if plan.fitted:
            raise UsageError(
                f"model {self.name}: layer {plan.fitted[0]} needs tensors fitted on text; "
                "write a checkpoint with vllm-ext plan and serve that"
            )
        return self.changed_config(plan)

    def check_windows(self, plan: AttentionPlan) -> None:
        """Raise UsageError for a window where the model itself has one, and so the layer never saw far."""
        windowed = [(layer, each.window) for layer, each in enumerate(plan.layers) if each.window is not None]
        if not windowed:
            return
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder or self.name)
        for layer, window in windowed:
            if (sliding := own_window(config, layer)) is not None:
                raise UsageError(
                    f"window {window} on layer {layer}: the model gives that layer a sliding window of {sliding} "
                    "already; leave it full"
                )

    def changed_config(self, plan: AttentionPlan) -> dict[str, Any]:
        """The keys of `config.json` in which the planned checkpoint differs."""
        return {"architectures": [self.family.planned_architecture], CONFIG_KEY: plan.to_config()}

    def head_shapes(self, head: HeadPlan) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that the head needs beside the weights, by name."""
        if not head.is_character:
            return {}
        hidden_size, vocab_size = (self.config.get(name) for name in ("hidden_size", "vocab_size"))
        try:
            tensors = head.shape(hidden_size, vocab_size).tensors  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"model {self.name}: hidden_size {hidden_size!r}, vocab_size {vocab_size!r}: {error}"
            ) from error
        return {head_tensor_name(name): shape for name, shape in tensors.items()}

    def fitted_shapes(self, plan: AttentionPlan) -> dict[str, tuple[int | None, ...]]:
        """The shapes of the tensors that the plan needs beside the weights, by name; None where `config.json` leaves
        the size to the model's class.
        """
        hidden = self.config.get("hidden_size")
        shapes: dict[str, tuple[int | None, ...]] = {}
        for layer in plan.fitted:
            rank = plan.layers[layer].rank
            sizes = {
                "bias": (hidden,),
                "weight": (hidden, hidden),
                "down": (rank, hidden),
                "up": (hidden, rank),
            }
            shapes |= {tensor_name(layer, name): sizes[name] for name in tensors_of(plan.layers[layer])}
        return shapes

    @cached_property
    def tensors(self) -> dict[str, list[str]]:
        """The tensors' names in each weight file, by the file's name, after checking that the files are whole.

        Raises:
            UsageError: where a file is missing, truncated or not safetensors.

        """
        assert self.folder is not None
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UsageError(
                    f"model {self.name}: {INDEX} does not say which file has which tensor; download it again"
                )
            files = sorted(set(weight_map.values()))
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"model {self.name}: no *.safetensors weights in that folder; convert or download them")
        return {name: self._tensors_in(name) for name in files}

    @property
    def files(self) -> list[Path]:
        """Its weight files."""
        assert self.folder is not None
        return [self.folder / name for name in self.tensors]

    def check_weights(self) -> None:
        """Read every weight file's header, and find the fitted tensors that the plan needs.

        Raises:
            UsageError: as `tensors` does, and where a fitted tensor is missing or of another shape.

        """
        from safetensors import safe_open

        files = {name: file for file, names in self.tensors.items() for name in names}
        assert self.folder is not None
        needed: dict[str, tuple[int | None, ...]] = {**self.head_shapes(self.head)}
        if self.plan is not None:
            needed |= self.fitted_shapes(self.plan)
        for name, expected in needed.items():
            if name not in files:
                raise UsageError(f"model {self.name}: no tensor {name}, which its plan needs; write it again")
            with safe_open(self.folder / files[name], framework="pt") as weights:
                shape = weights.get_slice(name).get_shape()
            wanted = [size or "any" for size in expected]
            if len(shape) != len(wanted) or not all(
                size in ("any", found) for size, found in zip(wanted, shape, strict=True)
            ):
                raise UsageError(
                    f"model {self.name}: tensor {name} is {shape}, but the plan needs {wanted}; write it again"
                )

    def _tensors_in(self, file: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        assert self.folder is not None
        try:
            # Reads the header, and checks it against the size.
            with safe_open(self.folder / file, framework="pt") as weights:
                return list(weights.keys())
        except FileNotFoundError:
            raise UsageError(f"model {self.name}: weight file {file} is missing; download it again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(
                f"model {self.name}: weight file {file} is damaged ({error}); download it again"
            ) from error
