"""What a plan costs, worked out from the model's configuration alone: KV cache, parameters, operations and bytes moved.

Tokens and blocks of the KV cache are counted as vLLM keeps them: the tests hold `kv_blocks` beside vLLM's own grouping
of layers, and `serving/capacity.py` asks vLLM itself about the engine that runs.

A step of an engine runs part after part: of every layer its projections of Q and O, of K and V, the attention itself
and the MLP; then the head. Counted are 2 operations a weight and row, 4 a pair of query and key in each of a head's
elements; the bytes of each weight once a step, and those of K and V as often as a request reads them. Norms, rotations,
activations, the embedding of tokens, sampling and the host's own work are not.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.families import Family, own_window
from model_executors.heads.head_plan import HeadPlan

BLOCK_SIZE = 16
"""Tokens of a KV block: vLLM's default on GPUs. Larger ones save somewhat less."""
SCREENED_ROWS = 4
"""The screened head answers batches of so many rows, and leaves larger ones to the stock head."""


@dataclass(frozen=True)
class Reach:
    """What a layer's queries see: all tokens, or the first `sink` and the last `window`, each once."""

    window: int | None = None
    sink: int = 0

    @classmethod
    def of(cls, plan: LayerPlan, own: int | None = None) -> Self:
        """A planned layer's, to which the model itself may give the window `own`."""
        return cls(own) if plan.window is None else cls(plan.window, plan.sink or 0)

    def tokens(self, context: int) -> int:
        """How many of a request's tokens the last one sees."""
        return context if self.window is None else min(context, self.sink + self.window)

    def blocks(self, context: int) -> int:
        """How many blocks of a request that is decoded vLLM keeps."""
        every = ceil(context / BLOCK_SIZE)
        if self.window is None:
            return every
        # A window may not begin with a block.
        return min(every, ceil(self.sink / BLOCK_SIZE) + ceil(self.window / BLOCK_SIZE) + 1)

    def pairs(self, new: int, seen: int) -> int:
        """Pairs of one of `new` queries and a key that it sees, after `seen` tokens."""
        first, last = seen + 1, seen + new
        most = self.tokens(last)
        below = min(new, max(0, most - first + 1))  # queries that see all before them
        return (first + first + below - 1) * below // 2 + (new - below) * most

    def read(self, new: int, seen: int) -> int:
        """Tokens whose K and V a step with `new` queries reads, after `seen` tokens."""
        return self.tokens(seen + new) if self.window is None else min(seen + new, self.tokens(seen + new) + new - 1)


def reaches(hf_config: Any, plan: AttentionPlan) -> dict[int, Reach]:
    """Of each layer that has a KV cache."""
    return {layer: Reach.of(plan.layers[layer], own_window(hf_config, layer)) for layer in plan.attending}


@dataclass(frozen=True)
class KvBytes:
    """Bytes of K and V over some layers and all ranks; vLLM rounds up to whole blocks."""

    token: int
    """For each token of the context, in the layers that hold every token."""
    window: int
    """For each request with a long context, in the layers that hold a sink and a window of it."""

    @classmethod
    def of(cls, held: Iterable[Reach], one: int) -> Self:
        """Of layers that look back so far, each holding `one` byte or more for a token."""
        found = list(held)
        growing = sum(each.window is None for each in found)
        return cls(growing * one, sum(each.sink + each.window for each in found if each.window is not None) * one)


def kv_blocks(held: Iterable[Reach], context: int) -> int:
    """Blocks of one layer each that vLLM keeps for a request of `context` tokens that it decodes.

    Layers that look back equally far share their blocks in groups, and all groups have as many layers: as many as those
    of which there are fewest, or those of which there are most where these are less than 1.5 times as many. What a
    group lacks is left empty, so that 15 windows of 30 layers take less than 16.
    """
    kinds = Counter(held)
    fewest, most = min(kinds.values(), default=0), max(kinds.values(), default=0)
    size = most if most < 1.5 * fewest else fewest
    return sum(ceil(count / size) * size * reach.blocks(context) for reach, count in kinds.items())


def saved_kv(hf_config: Any, plan: AttentionPlan, context: int) -> float:
    """The part of the KV-cache bytes of a request of `context` tokens that the plan saves; below 0 if it takes more."""
    ours, stock = (reaches(hf_config, each).values() for each in (plan, AttentionPlan.of(len(plan.layers))))
    return 1 - kv_blocks(ours, context) / kv_blocks(stock, context)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts: the checkpoint's that are held, those of the skipped attentions, and the fitted ones."""

    held: int
    dropped: int
    fitted: int


def count_parameters(hf_config: Any, family: Family, plan: AttentionPlan) -> Parameters:
    """Count the parameters of the Hugging Face model of that configuration, without making them; tied ones once."""
    skipped = set(plan.skipped)
    held = dropped = 0
    for name, parameter in _model(hf_config).named_parameters():
        if family.drops(name, skipped):
            dropped += parameter.numel()
        else:
            held += parameter.numel()
    return Parameters(held, dropped, fitted_parameters(hf_config.hidden_size, plan.layers))


def fitted_parameters(hidden_size: int, layers: Iterable[LayerPlan]) -> int:
    """Parameters of the consolidations."""
    count = 0
    for layer in layers:
        if layer.consolidation != "none":
            count += hidden_size
        if layer.consolidation == "linear":
            count += hidden_size * hidden_size if layer.rank is None else 2 * hidden_size * layer.rank
    return count


def _model(hf_config: Any) -> Any:
    """The Hugging Face model of that configuration, which holds nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


@dataclass(frozen=True)
class Weights:
    """A layer's matrices, as many weights as a token meets: of experts those that it is given to."""

    attention: int
    key_value: int
    """Those of `attention` that make K and V."""
    mlp: int


@dataclass(frozen=True)
class Shape:
    """A model's shape."""

    layers: tuple[Weights, ...]
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
        heads = hf_config.num_attention_heads
        head_size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
        met = _part_of_experts(hf_config)
        layers = []
        for layer in _model(hf_config).model.layers:
            attention = mlp = 0
            for name, weight in layer.named_parameters():
                if weight.dim() < 2:
                    continue
                if name.startswith(f"{family.attention}."):
                    attention += weight.numel()
                else:
                    mlp += int(weight.numel() * (met if ".experts." in f".{name}" else 1))
            layers.append(Weights(attention, 2 * kv_heads * head_size * hf_config.hidden_size, mlp))
        windows = tuple(own_window(hf_config, number) for number in range(len(layers)))
        sizes = hf_config.hidden_size, hf_config.vocab_size, heads, kv_heads, head_size
        return cls(tuple(layers), windows, *sizes)

    def kv_tokens(self, plan: AttentionPlan, context: int) -> int:
        """Tokens that one request of `context` holds in the KV cache, summed over layers."""
        return sum(Reach.of(plan.layers[layer], self.windows[layer]).tokens(context) for layer in plan.attending)

    def prefill_flops(self, plan: AttentionPlan, tokens: int) -> int:
        """Operations of a prompt of `tokens` in all layers."""
        return sum(part.flops for part in layer_parts(self, plan, [Step(tokens, 0, prompt=True)]))


def _part_of_experts(hf_config: Any) -> float:
    """What part of a layer's experts a token is given to."""
    chosen = [getattr(hf_config, name, None) for name in ("num_experts_per_tok", "moe_k", "moe_topk")]
    experts = [
        getattr(hf_config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    ]
    return next(filter(None, chosen), 1) / next(filter(None, experts), 1)


@dataclass(frozen=True)
class Step:
    """One request's part of an engine's step."""

    new: int
    """Tokens that it brings."""
    seen: int
    """Tokens that lie in the KV cache before it."""
    prompt: bool
    """Whether the new ones are a prompt, of which only the last is sampled from."""


@dataclass(frozen=True)
class Part:
    """A part of an engine's step, by what it needs."""

    name: str
    flops: int
    bytes: int
    """Moved."""


def parts(shape: Shape, plan: AttentionPlan, head: HeadPlan, steps: Sequence[Step]) -> list[Part]:
    """What a step needs, part by part; a part that needs nothing is left out."""
    return [*layer_parts(shape, plan, steps), _head(shape, head, _going_on(steps))]


def _going_on(steps: Sequence[Step]) -> int:
    """Rows above the first frozen layer and in the tail: a prompt's last token, and all of those generated."""
    return sum(1 if step.prompt else step.new for step in steps)


def layer_parts(shape: Shape, plan: AttentionPlan, steps: Sequence[Step]) -> list[Part]:
    """Those of the layers."""
    size = shape.element_bytes
    every, going_on = sum(step.new for step in steps), _going_on(steps)
    found: list[Part] = []

    def product(name: str, rows: int, weights: int) -> None:
        if rows and weights:
            found.append(Part(name, 2 * rows * weights, weights * size))

    for number, (weights, layer) in enumerate(zip(shape.layers, plan.layers, strict=True)):
        rows = going_on if number >= plan.first_partial else every
        if layer.kind == "skip":
            product("consolidation", rows, fitted_parameters(shape.hidden_size, [layer]))
        else:
            product("attention", rows, weights.attention - weights.key_value)
            product("key and value", every, weights.key_value)
            reach = Reach.of(layer, shape.windows[number])
            # A frozen layer's prompt is looked at by its last token alone.
            last = [Step(1, step.seen + step.new - 1, True) if step.prompt else step for step in steps]
            querying = last if layer.kind == "freeze" else steps
            pairs = sum(reach.pairs(step.new, step.seen) for step in querying)
            read = sum(reach.read(step.new, step.seen) for step in querying)
            flops = 4 * pairs * shape.heads * shape.head_size
            found.append(Part("scores", flops, 2 * read * shape.kv_heads * shape.head_size * size))
        product("mlp", rows, weights.mlp)
    return found


def _head(shape: Shape, head: HeadPlan, rows: int) -> Part:
    """Of rows that are all answered by the head itself: those that fall back are no part of the ideal."""
    weights = shape.vocab_size * shape.hidden_size
    if head.is_character:
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
