"""Attention plans fitted to a model: the consolidation of skipped layers.

What a planned layer puts in place of its attention (arXiv 2409.03621, section 5) is found in closed form from the
model's own activations on calibration text, with no gradient step. Layers are fitted lowest first, so that each fit
sees the stream that the planned layers below it have already changed. One layer and one passage are computed at a time;
the stream between two layers lies on disk. `vllm-ext plan` runs it.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from model_executors.attention_plan import AttentionPlan, LayerPlan, tensor_name
from model_executors.families import Family
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.offline.attentions import Attend, Seen, Skipped
from vllm_ext.offline.model import Call, load, read_tokenizer
from vllm_ext.planned_checkpoint import Fit
from vllm_ext.progress import progress
from vllm_ext.tasks.passages import cut
from vllm_ext.versions import offline_versions

RIDGE = 1e-3
"""Added to the diagonal of the inputs' covariance, as a part of its mean."""


def fit(
    source: Checkpoint,
    plan: AttentionPlan,
    texts: Sequence[str],
    *,
    tokens: int,
    length: int,
    seed: int,
    name: str = "text",
) -> Fit:
    """Fit the plan to the model on `tokens` tokens of `texts`, in passages of `length` tokens drawn with `seed`.

    `name` is what the text is called in the provenance. It says on stderr how far it is.

    Raises:
        UsageError: for too little text, a plan that does not fit the model, or a model that cannot be read.

    """
    assert source.folder is not None
    _check(AutoConfig.from_pretrained(source.folder), plan, length)
    tokenizer = read_tokenizer(source)
    passages = cut(tokenizer, texts, tokens=tokens, length=length, seed=seed)
    tensors, errors = fit_passages(load(source.folder), source.family, plan, passages)
    text = {"name": name, "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    return Fit(
        tensors,
        {
            "text": text,
            "tokens": passages.numel(),
            "length": length,
            "seed": seed,
            "versions": offline_versions(),
            "relative_errors": {str(layer): round(error, 4) for layer, error in errors.items()},
        },
    )


def _check(config: PretrainedConfig, plan: AttentionPlan, length: int) -> None:
    """What would fail, or be fitted wrongly, long after the start."""
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise UsageError(f"--length {length}: the model takes {longest} tokens; lower it")
    for layer in plan.fitted:
        rank = plan.layers[layer].rank
        if rank is not None and rank >= config.hidden_size:
            raise UsageError(f"--rank {rank}: a full map has {config.hidden_size}; give less, or leave it out")


def fit_passages(
    model: PreTrainedModel, family: Family, plan: AttentionPlan, passages: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """The fitted tensors by name, and by layer how far its output is from the attention's, as a part of that.

    `passages` are `[num_passages, length]`. The model is one of `load`'s, and is used up: layers that are done with are
    emptied.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder: Any = model.model
    layers = decoder.layers
    last = plan.fitted[-1]
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[int, float] = {}
    with torch.no_grad(), progress() as bars:
        task = bars.add_task("embeddings", total=(2 + last + len(plan.fitted)) * len(passages))
        stream = Stream(decoder, passages.to(device), lambda: bars.advance(task))
        for number in range(last + 1):
            layer_plan = plan.layers[number]
            bars.update(task, description=f"layer {number} of 0-{last}: {layer_plan.kind}")
            layer = layers[number].to(device, torch.float32)
            attention = getattr(layer, family.attention)
            made: dict[str, torch.Tensor] = {}
            if layer_plan.window is not None:
                attention.attend = Attend(window=layer_plan.window, sink=layer_plan.sink)
            elif layer_plan.kind == "skip":
                if layer_plan.fitted:
                    moments = Moments(layer_plan)
                    hook = attention.register_forward_hook(moments, with_kwargs=True)
                    stream.run(number, layer)
                    hook.remove()
                    made = moments.solve(model.dtype)
                setattr(layer, family.attention, Skipped(**made))
            error = Error(attention)
            if made:
                getattr(layer, family.attention).register_forward_hook(error, with_kwargs=True)
            stream.run(number, layer)
            if made:
                errors[number] = error.relative
                tensors |= {tensor_name(number, name): tensor.cpu().contiguous() for name, tensor in made.items()}
            layer.to("meta")
    return tensors, errors


class Stream:
    """The hidden states that enter a layer, `[num_passages, length, hidden_size]` on disk, taken up layer by layer."""

    def __init__(self, decoder: Any, passages: torch.Tensor, done: Callable[[], None]) -> None:
        self.done = done
        layers = decoder.layers
        # What the model gives its layers beside the stream is the same for all passages: their length is.
        self.calls = [Call() for _ in layers]
        decoder.layers = nn.ModuleList(self.calls)
        decoder.to(passages.device, torch.float32)
        for number, passage in enumerate(passages):
            decoder(passage[None], use_cache=False)
            entered = self.calls[0].hidden_states[0]
            if number == 0:
                self.hidden_states = _on_disk(len(passages), *entered.shape)
            self.hidden_states[number] = entered
            done()
        decoder.layers = layers

    def run(self, number: int, layer: nn.Module) -> None:
        """Take the stream through a layer; a passage whose run ends with `Seen` stays where it is."""
        call = self.calls[number]
        for hidden_states in self.hidden_states:
            with suppress(Seen):
                hidden_states.copy_(call.through(layer, hidden_states[None].to(call.hidden_states.device))[0])
            self.done()


class Moments:
    """What every consolidation follows from, collected by a forward hook of the attention: sums over its inputs x and
    its outputs y.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.rows = 0
        self.x = self.y = self.xx = self.xy = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> NoReturn:
        """Add up a passage: `[1, length, hidden_size]` in and out."""
        x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0].double()
        y = output[0][0].double()
        self.rows += len(x)
        self.y = self.y.to(y.device) + y.sum(0)
        if self.plan.consolidation == "linear":
            self.x = self.x.to(x.device) + x.sum(0)
            self.xx = self.xx.to(x.device) + x.T @ x
            self.xy = self.xy.to(x.device) + x.T @ y
        raise Seen

    def solve(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Ridge regression of y on x with an intercept, and of reduced rank where the plan has one; in `dtype`."""
        y = self.y / self.rows
        if self.plan.consolidation == "bias":
            return {"bias": y.to(dtype)}
        x = self.x / self.rows
        xx = self.xx / self.rows - x.outer(x)  # the covariances
        xy = self.xy / self.rows - x.outer(y)
        xx.diagonal().add_(RIDGE * xx.diagonal().mean())
        weight = torch.linalg.solve(xx, xy).T  # [hidden_size, hidden_size]
        if self.plan.rank is None:
            made = {"weight": weight.to(dtype)}
            weight = made["weight"].double()
        else:  # the directions in which the full map's outputs vary most
            up = torch.linalg.eigh(weight @ xy).eigenvectors[:, -self.plan.rank :]
            made = {"down": (up.T @ weight).to(dtype), "up": up.to(dtype)}
            weight = made["up"].double() @ made["down"].double()
        # After rounding, so that the mean stays exact.
        return made | {"bias": (y - weight @ x).to(dtype)}


class Error:
    """How far a module's outputs are from those of the attention that it stands for, given the same input."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.missed = self.whole = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook."""
        wanted = self.attention(*args, **kwargs)[0]
        self.missed += (output[0] - wanted).square().sum().item()
        self.whole += wanted.square().sum().item()

    @property
    def relative(self) -> float:
        """The root of the squared error by the squared output; nothing, where both are nothing."""
        return math.sqrt(self.missed / self.whole) if self.missed else 0.0


def _on_disk(*shape: int) -> torch.Tensor:
    """Room for float32 in a file without a name, which goes when the tensor goes, however the process ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "hidden_states")
        return torch.from_file(file, shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
