"""vLLM's decoder classes with an attention plan: one adapter for every family in the table.

The stock model is built and then changed where the plan says so: a skipped layer (arXiv 2409.03621, section 5) gives up
its attention, and with it the weights and the KV cache; a window layer keeps its first and last tokens; frozen layers
run for the tokens that need them. The layers above the last one that attends, the *tail*, need no other token's state.
They run in `compute_logits`, which vLLM calls for sampled positions only, so prompt tokens never enter them.

vLLM imports the classes lazily by name, as `model_executors.layers.decoder:AttentionPlanLlamaForCausalLM`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from model_executors.attention_plan import ARCHITECTURE_PREFIX, CONFIG_KEY, AttentionPlan, tensor_name
from model_executors.families import Family, family_of
from model_executors.heads.fallback_head import FallbackHead, head_of
from model_executors.heads.screened_head import screen
from model_executors.layers.adapters import restrict_adapters
from model_executors.layers.consolidation import Consolidation
from model_executors.layers.freeze import Freeze, FrozenAttention, frozen_backend
from model_executors.layers.stream import DeferredLayers, ResidualSum
from model_executors.layers.window import rebuilt, window_attention


# The number of rows is unbacked: vLLM compiles without guards, and what was first traced with a single row, as with
# --max-num-seqs 1, would otherwise hold for a single row only.
@support_torch_compile(dynamic_arg_dims={"hidden_states": 0}, mark_unbacked_dims={"hidden_states": 0})
class Tail(DeferredLayers):
    """The layers above the last one that attends, and the final norm; compiled by vLLM, apart from the model below."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[num_sampled_tokens, hidden_size]`, from the stream that enters the tail to what the head reads."""
        return self.run([None] * len(self.parts[0]), hidden_states)


class AttentionPlanDecoder(nn.Module):
    """Mixin before a stock `...ForCausalLM`: changes its layers by the plan in `hf_config`."""

    family: ClassVar[Family]
    model: Any  # the stock class's decoder: its layers, start_layer, end_layer and final norm

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.plan = AttentionPlan.from_hf_config(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM compiles some families with their head, as one. Here the decoder is compiled alone, as of all others:
        # which layers a step runs is decided between the parts.
        self.do_not_compile = True
        self.vllm_config = vllm_config
        self.tail: Tail | None = None
        self.freeze: Freeze | None = None
        self.fitted: dict[str, nn.Parameter] = {}
        self.head: FallbackHead | None = None
        for layer in range(self.model.start_layer, self.model.end_layer):
            self._change_layer(layer, vllm_config)
        if get_pp_group().is_last_rank:
            self._defer_upper_layers(vllm_config)
            self.head = head_of(vllm_config, self)
            screen(getattr(self, "lm_head", None), vllm_config)
        if self.head is not None:
            self.fitted |= self.head.tensors
        self.unfitted = set(self.fitted)
        if vllm_config.lora_config is not None and self.plan.first_partial < len(self.plan.layers):
            restrict_adapters(self, vllm_config.lora_config, self.plan.first_partial)

    def _change_layer(self, number: int, vllm_config: VllmConfig) -> None:
        """Change the layer by the plan. vLLM's forward context is what gives an attention its KV cache."""
        forward_context = vllm_config.compilation_config.static_forward_context
        plan = self.plan.layers[number]
        layer = self.model.layers[number]
        attention = getattr(layer, self.family.attention)
        if plan.kind == "skip":
            dropped = set(attention.modules())
            for name in [name for name, module in forward_context.items() if module in dropped]:
                del forward_context[name]
            hidden_size = vllm_config.model_config.get_hidden_size()
            prefix = f"model.layers.{number}.{self.family.attention}"
            changed = Consolidation(hidden_size, plan, self.family.reduced, prefix)
            setattr(layer, self.family.attention, changed)
            self.fitted |= {tensor_name(number, name): parameter for name, parameter in changed.fitted.items()}
        elif plan.kind != "full":
            backend = frozen_backend if plan.kind == "freeze" else lambda windowed: windowed
            context = (vllm_config.cache_config, forward_context, backend)
            if plan.window is not None and plan.sink is not None:
                attention.attn = window_attention(attention.attn, plan.window, plan.sink, *context)
            else:
                attention.attn = rebuilt(attention.attn, *context)
            if plan.kind == "freeze":
                setattr(layer, self.family.attention, FrozenAttention(attention, self.family))

    def _defer_upper_layers(self, vllm_config: VllmConfig) -> None:
        """Take the tail out of the forward pass, for `compute_logits` to run it, and what is frozen out of the stock
        class's part of it. The last pipeline rank holds all of both: no rank goes without an attending layer.
        """
        model, plan, family = self.model, self.plan, self.family
        norm = getattr(model, family.norm)
        if plan.has_tail:
            with set_model_tag("tail"):
                layers = model.layers[plan.tail_start : model.end_layer]
                self.tail = Tail(vllm_config=vllm_config, layers=layers, norm=norm, family=family)
            model.end_layer = plan.tail_start
            setattr(model, family.norm, ResidualSum(norm, family))
        if plan.first_frozen < model.end_layer:
            layers = model.layers[plan.first_frozen : model.end_layer]
            self.freeze = Freeze(vllm_config, layers, getattr(model, family.norm), family)
            model.end_layer = plan.first_frozen
            setattr(model, family.norm, ResidualSum(norm, family))

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | Any:
        """`[num_tokens, hidden_size]`: what enters the tail, or the head where there is none."""
        hidden_states = super().forward(input_ids, positions, *args, **kwargs)
        return hidden_states if self.freeze is None else self.freeze(positions, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint, but for the skipped attentions, and the fitted tensors that lie beside it.

        Raises:
            ValueError: where a fitted tensor is missing.

        """
        loaded = super().load_weights(self._stock_weights(weights))  # type: ignore[misc]
        if self.unfitted:
            raise ValueError(f"the checkpoint has no {min(self.unfitted)}; write it with vllm-ext plan")
        if self.head is not None:
            self.head.loaded()
        ours = {id(parameter) for parameter in self.fitted.values()}
        return loaded | {name for name, parameter in self.named_parameters() if id(parameter) in ours}

    def _stock_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the fitted tensors on the way and leave out those of skipped attentions."""
        skipped = set(self.plan.skipped)
        for name, tensor in weights:
            if (parameter := self.fitted.get(name)) is not None:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
                self.unfitted.discard(name)
            elif not (name.startswith(f"{CONFIG_KEY}.") or self.family.drops(name, skipped)):
                yield name, tensor


def _after_tail(method: Callable[..., Any]) -> Callable[..., Any]:
    """The stock head's `method`, given the tail's output where there is a tail, or asked by the plan's head."""

    def run(self: AttentionPlanDecoder, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.tail is not None:
            with set_forward_context(None, self.vllm_config):  # in which experts find themselves
                hidden_states = self.tail(hidden_states)
        if self.head is not None:
            return self.head(hidden_states, lambda rows: method(self, rows, *args, **kwargs))
        return method(self, hidden_states, *args, **kwargs)

    return run


def planned_class(family: Family, adapter: type[AttentionPlanDecoder]) -> type[nn.Module]:
    """The planned class of a family: vLLM's own, with the adapter in front."""
    stock = ModelRegistry.models[family.architecture].load_model_cls()
    # Every way from hidden states to tokens goes through the tail; which of them a class has depends on the family.
    heads = [name for name in ("compute_logits", "compute_logits_local", "get_top_tokens") if hasattr(stock, name)]
    return type(
        family.planned_architecture,
        (adapter, stock),
        {
            "__module__": adapter.__module__,
            "family": family,
            **{name: _after_tail(getattr(stock, name)) for name in heads},
        },
    )


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class that vLLM asks for by name (PEP 562)."""
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, planned_class(family_of(name), AttentionPlanDecoder))
