"""What the arithmetic allows: the time of a step by a roofline, from the plan, the model's shape and the work.

A step runs part after part: of every layer its projections of Q and O, of K and V, the attention itself and the MLP;
then the head. A part needs floating-point operations and moves bytes, and takes

    seconds = max(operations / F, bytes / B)

where F and B are what this machine reaches in a plain matrix product and in plainly reading memory (`machine.py`),
and a step takes the sum of its parts. In a long prefill every part is bound by F, so that the ratio of two plans is
that of their operations; in a decode of one stream by B, so that it is that of the bytes of weights and KV cache.
Where streams are many, some parts are bound by the one and some by the other.

Counted are 2 operations a weight and row, 4 a pair of query and key in each of a head's elements; the bytes of each
weight once a step, and those of K and V as often as a request reads them. Norms, rotations, activations, the embedding
of tokens, sampling and the host's own work are not: an ideal is what nothing but the products would take.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from model_executors.attention_plan import AttentionPlan
from model_executors.families import Family
from model_executors.heads.head_plan import HeadPlan
from vllm_ext.bench.work import Step
from vllm_ext.costs import active_weights, fitted_parameters, kv_shape, own_window

SCREENED_ROWS = 4
"""The screened head answers batches of so many rows, and leaves larger ones to the stock head."""


@dataclass(frozen=True)
class Machine:
    """What plain products reach."""

    flops: float
    """Operations a second."""
    bandwidth: float
    """Bytes a second."""


@dataclass(frozen=True)
class Part:
    """A part of a step, by what it needs."""

    name: str
    flops: int
    bytes: int

    def seconds(self, machine: Machine) -> float:
        """The roofline's."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


@dataclass(frozen=True)
class Layer:
    """A layer's weights, as many as a token meets."""

    attention: int
    key_value: int
    """Those of `attention` that make K and V."""
    mlp: int


@dataclass(frozen=True)
class Shape:
    """A model's shape."""

    layers: tuple[Layer, ...]
    windows: tuple[int | None, ...]
    """The sliding windows that the model itself gives its layers."""
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2

    @classmethod
    def of(cls, hf_config: Any, family: Family) -> Self:
        """Of the Hugging Face model of that configuration, whose weights are counted without making them."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
        kv_heads, head_size = kv_shape(hf_config)
        layers = []
        active = active_weights(hf_config)
        for layer in model.model.layers:
            matrices = [(name, weight) for name, weight in layer.named_parameters() if weight.dim() > 1]
            own = f"{family.attention}."
            attention = sum(weight.numel() for name, weight in matrices if name.startswith(own))
            mlp = sum(active((name, weight)) for name, weight in matrices if not name.startswith(own))
            layers.append(Layer(attention, 2 * kv_heads * head_size * hf_config.hidden_size, mlp))
        return cls(
            tuple(layers),
            tuple(own_window(hf_config, number) for number in range(len(layers))),
            hf_config.hidden_size,
            hf_config.vocab_size,
            hf_config.num_attention_heads,
            kv_heads,
            head_size,
        )


def looks(step: Step, window: int | None) -> int:
    """Pairs of a query and a key that it may see."""
    first, last = step.seen + 1, step.seen + step.new
    if window is None or last <= window:
        return (first + last) * step.new // 2
    below = max(0, window - first + 1)  # queries that see all before them
    return (first + first + below - 1) * below // 2 + (step.new - below) * window


def parts(shape: Shape, plan: AttentionPlan, head: HeadPlan, steps: Sequence[Step]) -> list[Part]:
    """What a step needs, part by part; a part that needs nothing is left out."""
    size = shape.element_bytes
    every = sum(step.new for step in steps)
    # Above the first frozen layer and in the tail: a prompt's last token, and all of those that are generated.
    going_on = sum(1 if step.prompt else step.new for step in steps)
    found: list[Part] = []

    def product(name: str, rows: int, weights: int) -> None:
        if rows and weights:
            found.append(Part(name, 2 * rows * weights, weights * size))

    for number, (layer, each) in enumerate(zip(shape.layers, plan.layers, strict=True)):
        rows = going_on if number >= plan.first_partial else every
        if each.kind == "skip":
            product("consolidation", rows, fitted_parameters(shape.hidden_size, AttentionPlan.of(2, {1: each})))
        else:
            product("attention", rows, layer.attention - layer.key_value)
            product("key and value", every, layer.key_value)
            window = each.window or shape.windows[number]
            # A frozen layer's prompt is looked at by its last token alone.
            last = [Step(1, step.seen + step.new - 1, True) if step.prompt else step for step in steps]
            querying = last if each.kind == "freeze" else steps
            pairs = sum(looks(step, window) for step in querying)
            reach = [step.seen + step.new for step in querying]
            read = sum(
                reached if window is None else min(reached, window + step.new - 1)
                for reached, step in zip(reach, querying, strict=True)
            )
            flops = 4 * pairs * shape.heads * shape.head_size
            found.append(Part("scores", flops, 2 * read * shape.kv_heads * shape.head_size * size))
        product("mlp", rows, layer.mlp)
    found.append(_head(shape, head, going_on))
    return found


def _head(shape: Shape, head: HeadPlan, rows: int) -> Part:
    """Of rows that are all answered by the head itself: those that fall back are no part of the ideal."""
    weights = shape.vocab_size * shape.hidden_size
    if head.spells:
        # The scores of all tokens are sums of one number a place.
        own = head.bytes(shape.hidden_size, shape.vocab_size, shape.element_bytes)
        places = shape.vocab_size * len(head.slots)
        made = sum(head.slots) * shape.hidden_size + 3 * head.width * shape.hidden_size
        exact = head.shortlist * shape.hidden_size if head.kind == "rescored" else 0
        return Part("head", rows * (2 * (made + exact) + places), own + rows * exact * shape.element_bytes)
    if head.kind == "screened" and rows <= SCREENED_ROWS:
        exact = head.shortlist * shape.hidden_size
        own = head.bytes(shape.hidden_size, shape.vocab_size, shape.element_bytes)
        return Part("head", 2 * rows * (weights + exact), own + rows * exact * shape.element_bytes)
    return Part("head", 2 * rows * weights, weights * shape.element_bytes)


def seconds(found: Sequence[Part], machine: Machine) -> float:
    """Of all parts, one after another."""
    return sum(part.seconds(machine) for part in found)


def kv_tokens(shape: Shape, plan: AttentionPlan, context: int) -> int:
    """Tokens that one request of `context` holds in the KV cache, summed over layers."""
    return sum(
        min(window, context) if (window := each.window or own) else context
        for each, own in zip(plan.layers, shape.windows, strict=True)
        if each.kind != "skip"
    )
