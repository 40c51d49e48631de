"""A checkpoint in plain transformers, its layers run one by one, with their attentions changed by a plan.

What is fitted (`fit.py`) and what is probed (`probe/`) is computed with it, on the CPU or on CUDA, apart from vLLM.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    DynamicCache,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from model_executors.attention_plan import FULL, LayerPlan, tensor_name, tensors_of
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.dtypes import slow_on_cpu
from vllm_ext.errors import UsageError
from vllm_ext.offline.attentions import Attend, Forks, Keep, Seen, Skipped, attend_as_told, attending

ATTENTION = "vllm_ext_offline"
LOGITS_AT_ONCE = 256
"""Rows whose logits are computed at once."""

Plans = Mapping[int, LayerPlan]
Fitted = Mapping[str, torch.Tensor]


class OfflineModel:
    """A checkpoint, loaded for good, whose layers are run with or without changes."""

    def __init__(self, source: Checkpoint) -> None:
        assert source.folder is not None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load(source.folder)
        self.dtype = model.dtype
        """What the checkpoint is in; the model here is in float32 where a CPU is slow with that."""
        slow = self.device.type == "cpu" and slow_on_cpu(model.dtype)
        model = model.to(self.device)  # with no type, which would round the rotary frequencies too
        self.model = (model.float() if slow else model).requires_grad_(False)
        self.decoder = self.model.model
        self.layers = self.decoder.layers
        self.family = source.family

    def attention(self, number: int) -> Any:
        """A layer's attention."""
        return getattr(self.layers[number], self.family.attention)

    @torch.no_grad()
    def enter(self, tokens: torch.Tensor, forks: Forks = (), **settings: Any) -> "Activations":
        """What enters layer 0, and what the model gives each layer beside it; `settings` go to the decoder."""
        calls = [Call() for _ in self.layers]
        with self._in_place_of_layers(calls):
            self.decoder(tokens, **{"use_cache": False} | settings)
        return Activations(calls[0].hidden_states, calls, forks)

    def logits(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """`[rows, hidden_size]` that leave the last layer to float32 `[some rows, vocab_size]`, some rows at a time."""
        for rows in hidden_states.split(LOGITS_AT_ONCE):
            with self._in_place_of_layers([Give(rows[None])]):
                yield self.model(torch.zeros(1, len(rows), dtype=torch.long, device=self.device)).logits[0].float()

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` that leave the last layer to what the head reads."""
        with self._in_place_of_layers([Give(hidden_states[None])]):
            tokens = torch.zeros(1, len(hidden_states), dtype=torch.long, device=self.device)
            return self.decoder(tokens, use_cache=False).last_hidden_state[0]

    @contextmanager
    def _in_place_of_layers(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        self.decoder.layers = nn.ModuleList(modules)
        try:
            yield
        finally:
            self.decoder.layers = self.layers


class Activations:
    """A batch that has entered the model: the states that the unchanged model makes of it, where they are needed."""

    def __init__(self, hidden_states: torch.Tensor, calls: Sequence["Call"], forks: Forks = ()) -> None:
        self.calls, self.forks = calls, forks
        self.states = {0: hidden_states}

    def state(self, model: OfflineModel, number: int) -> torch.Tensor:
        """`[batch, length, hidden_size]`: what enters that layer; for the number of layers, what leaves the last."""
        start = max(known for known in self.states if known <= number)
        hidden_states = self.states[start]
        for layer in range(start, number):
            hidden_states = PlannedModel(model).layer(layer, hidden_states, self)
        self.states[number] = hidden_states
        return hidden_states

    def forget(self, number: int) -> None:
        """Let go of the states between the first and the last that leads to that one; they would be computed again."""
        start = max(known for known in self.states if known <= number)
        self.states = {layer: state for layer, state in self.states.items() if layer == 0 or layer >= start}


class PlannedModel:
    """A model whose layers have other attentions, as a plan says.

    `fitted` are the plan's tensors by their names in a checkpoint. `frozen_rows` `[batch, length]` are those whose K
    and V come, in frozen layers, from the state that enters the first of them.
    """

    def __init__(
        self,
        model: OfflineModel,
        plans: Plans | None = None,
        fitted: Fitted | None = None,
        frozen_rows: torch.Tensor | None = None,
    ) -> None:
        self.model, self.plans, self.fitted, self.frozen_rows = model, plans or {}, fitted or {}, frozen_rows
        self.frozen: torch.Tensor | None = None
        self.frozen_kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, entered: Activations, hidden_states: torch.Tensor, first: int) -> torch.Tensor:
        """From what enters layer `first` to what leaves the last, both `[batch, length, hidden_size]`."""
        for number in range(first, len(self.model.layers)):
            hidden_states = self.layer(number, hidden_states, entered)
        return hidden_states

    def layer(self, number: int, hidden_states: torch.Tensor, entered: Activations) -> torch.Tensor:
        """`[batch, length, hidden_size]` through one layer."""
        with attending(self.model.attention(number), forks=entered.forks):
            return self._layer(number, hidden_states, entered)

    def _layer(self, number: int, hidden_states: torch.Tensor, entered: Activations) -> torch.Tensor:
        plan = self.plans.get(number, FULL)
        layer, attention, call = self.model.layers[number], self.model.attention(number), entered.calls[number]
        device = hidden_states.device
        constants = {name: self.fitted[tensor_name(number, name)].to(device) for name in tensors_of(plan)}
        if plan.kind == "skip":
            setattr(layer, self.model.family.attention, Skipped(**constants))
            try:
                return call.through(layer, hidden_states)
            finally:
                setattr(layer, self.model.family.attention, attention)
        if plan.kind == "freeze" and number not in self.frozen_kv:
            if self.frozen is None:
                self.frozen = hidden_states
            kept = Keep()
            with attending(attention, attend=kept), suppress(Seen):
                call.through(layer, self.frozen, past_key_values=None)
            self.frozen_kv[number] = kept.key, kept.value
        if plan.kind == "full":
            return call.through(layer, hidden_states)
        attend = Attend(self.frozen_kv.get(number), self.frozen_rows, plan.window, plan.sink)
        with attending(attention, attend=attend):
            return call.through(layer, hidden_states)


@torch.no_grad()
def generate(
    changed: PlannedModel,
    prompts: torch.Tensor,
    tokens: int,
    first: int | None = None,
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Greedy answers `[batch, tokens]` to prompts of one length, `[batch, length]`.

    `edit` changes the prompts' states where they enter layer `first`.
    """
    model, cache, given = changed.model, DynamicCache(), []
    entering = prompts
    for step in range(tokens):
        positions = torch.arange(entering.shape[1], device=model.device) + (prompts.shape[1] + step - 1 if step else 0)
        entered = model.enter(entering, use_cache=True, past_key_values=cache, position_ids=positions[None])
        hidden_states = entered.states[0]
        for number in range(len(model.layers)):
            if step == 0 and number == first and edit is not None:
                hidden_states = edit(hidden_states)
            hidden_states = changed.layer(number, hidden_states, entered)
        entering = torch.cat([logits.argmax(-1) for logits in model.logits(hidden_states[:, -1])])[:, None]
        given.append(entering)
    return torch.cat(given, 1)


def load(folder: Path) -> PreTrainedModel:
    """The model in its own type, on the CPU, with an attention function that shows what it attends with.

    Raises:
        UsageError: for weights that transformers cannot read in full, as most quantized ones.

    """
    AttentionInterface.register(ATTENTION, attend_as_told)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    settings: dict[str, Any] = {"dtype": "auto", "attn_implementation": ATTENTION, "output_loading_info": True}
    quantization = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if quantization is not None:
        method = quantization["quant_method"]
        if method != "compressed-tensors":
            raise UsageError(f"model {folder}: cannot be fitted with {method} weights; plan what it was quantized from")
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    loading: Any = AutoModelForCausalLM.from_pretrained(folder, **settings)
    model, loaded = loading
    if loaded["missing_keys"]:
        raise UsageError(f"model {folder}: transformers finds no weights for {min(loaded['missing_keys'])}; convert it")
    return model


def read_tokenizer(source: Checkpoint) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        UsageError: where there is none.

    """
    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {source.name}: no tokenizer in that folder to read text with; add it") from error


class Call(nn.Module):
    """Takes a layer's place, and keeps what it is called with."""

    hidden_states: torch.Tensor

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hand on the stream as it is."""
        self.hidden_states, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states

    def through(self, layer: nn.Module, hidden_states: torch.Tensor, **changes: Any) -> torch.Tensor:
        """Call that layer so, with other states of the same shape, and with `changes` of the arguments it has."""
        left = layer(hidden_states, *self.args, **self.kwargs | {k: v for k, v in changes.items() if k in self.kwargs})
        return left if isinstance(left, torch.Tensor) else left[0]


class Give(nn.Module):
    """Takes the place of all layers: whatever enters, these states leave."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *unused_args: Any, **unused: Any) -> torch.Tensor:
        """`[1, rows, hidden_size]`"""
        return self.hidden_states
