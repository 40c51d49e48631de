"""vLLM's decoder classes with an attention plan: one adapter for every family in the table.

The stock model is built and then thinned: a skipped layer (arXiv 2409.03621, section 5) gives up its input norm and
attention, and with them their weights and the KV cache. The layers above the last one that attends, the *tail*, need
no other token's state. They run in `compute_logits`, which vLLM calls for sampled positions only, so prompt tokens
never enter them.

vLLM imports the classes lazily by name, as `model_executors.decoder:AttentionPlanLlamaForCausalLM`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.utils import PPMissingLayer

from model_executors.attention_plan import ARCHITECTURE_PREFIX, AttentionPlan
from model_executors.families import Family, family_of


class SkipLayer(nn.Module):
    """A decoder layer without its attention. The modules that remain keep their names, so weights load as usual."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.family = family
        known = {*family.attention, family.mlp_norm, family.mlp, family.mlp_post_norm}
        if unknown := {name for name, _ in layer.named_children()} - known:
            raise ValueError(f"{family.architecture}: {', '.join(sorted(unknown))} in a layer have no attention plan")
        for name, module in layer.named_children():
            # vLLM's placeholder: its loaders pass over checkpoint tensors of modules that are not held here.
            self.add_module(name, PPMissingLayer() if name in family.attention else module)

    def forward(
        self,
        positions: torch.Tensor | None,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        **unused: None,  # what a model passes on for modules that the constructor refuses (Mistral's t_cond)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the MLP's output: hidden_states and residual `[num_tokens, hidden_size]`, positions unused."""
        norm = getattr(self, self.family.mlp_norm)
        if residual is None:
            residual = hidden_states
            hidden_states = norm(hidden_states)
        else:
            hidden_states, residual = norm(hidden_states, residual)
        hidden_states = getattr(self, self.family.mlp)(hidden_states)
        if self.family.mlp_post_norm is not None:
            hidden_states = getattr(self, self.family.mlp_post_norm)(hidden_states)
        return hidden_states, residual


class ResidualSum(nn.Module):
    """Stands where the final norm stood: closes the residual stream and leaves the norm to the tail.

    It holds the norm's parameters, under the same names, so that they are loaded as they would have been.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[num_tokens, hidden_size]` twice, to their sum."""
        return hidden_states + residual, None


# The number of rows is unbacked: vLLM compiles without guards, and what was first traced with a single row, as with
# --max-num-seqs 1, would otherwise hold for a single row only.
@support_torch_compile(dynamic_arg_dims={"hidden_states": 0}, mark_unbacked_dims={"hidden_states": 0})
class Tail(nn.Module):
    """The layers above the last one that attends, and the final norm; compiled by vLLM, apart from the model below."""

    def __init__(self, *, vllm_config: VllmConfig, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        # In a tuple, or torch would list their parameters a second time under the tail's name.
        self.parts = (tuple(layers), norm)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[num_sampled_tokens, hidden_size]`, from the stream that enters the tail to what the head reads."""
        layers, norm = self.parts
        residual = None
        for layer in layers:
            hidden_states, residual = layer(None, hidden_states, residual)
        return norm(hidden_states, residual)[0]


class AttentionPlanDecoder(nn.Module):
    """Mixin before a stock `...ForCausalLM`: thins its layers by the plan in `hf_config`."""

    family: ClassVar[Family]
    model: Any  # the stock class's decoder: its layers, start_layer, end_layer and norm

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = AttentionPlan.from_hf_config(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tail: Tail | None = None
        self.skip(plan, vllm_config.compilation_config.static_forward_context)
        if get_pp_group().is_last_rank:
            self.defer_tail(plan, vllm_config)

    def skip(self, plan: AttentionPlan, forward_context: dict[str, Any]) -> None:
        """Replace the skipped layers of this rank; `forward_context` is what gives an attention its KV cache."""
        model = self.model
        for layer in range(model.start_layer, model.end_layer):
            if plan.kinds[layer] != "skip":
                continue
            dropped = set(model.layers[layer].self_attn.modules())
            for name in [name for name, module in forward_context.items() if module in dropped]:
                del forward_context[name]
            model.layers[layer] = SkipLayer(model.layers[layer], self.family)

    def defer_tail(self, plan: AttentionPlan, vllm_config: VllmConfig) -> None:
        """Take the tail out of the forward pass, for `compute_logits` to run it."""
        model = self.model
        if plan.has_tail:  # the last pipeline rank holds all of it: no rank goes without an attending layer
            with set_model_tag("tail"):
                layers = model.layers[plan.tail_start : model.end_layer]
                self.tail = Tail(vllm_config=vllm_config, layers=layers, norm=model.norm)
            model.end_layer = plan.tail_start
            model.norm = ResidualSum(model.norm)


def _after_tail(method: Callable[..., Any]) -> Callable[..., Any]:
    """The head's `method`, given the tail's output where there is a tail."""

    def run(self: AttentionPlanDecoder, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.tail is not None:
            hidden_states = self.tail(hidden_states)
        return method(self, hidden_states, *args, **kwargs)

    return run


def _planned(family: Family) -> type[nn.Module]:
    """The planned class of a family: vLLM's own, with the adapter in front."""
    stock = ModelRegistry.models[family.architecture].load_model_cls()
    # Every way from hidden states to tokens goes through the tail; which of them a class has depends on the family.
    heads = [name for name in ("compute_logits", "compute_logits_local", "get_top_tokens") if hasattr(stock, name)]
    return type(
        family.planned_architecture,
        (AttentionPlanDecoder, stock),
        {"__module__": __name__, "family": family, **{name: _after_tail(getattr(stock, name)) for name in heads}},
    )


def __getattr__(name: str) -> type[nn.Module]:
    """Make the class that vLLM asks for by name (PEP 562)."""
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _planned(family_of(name)))
