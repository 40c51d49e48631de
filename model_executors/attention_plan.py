"""The attention plan: what each decoder layer's attention becomes.

*Attend First, Consolidate Later* (arXiv 2409.03621, section 5) shows that attention to earlier tokens hardly matters in
a decoder's upper layers. A plan gives every layer one of four kinds: `full`, `window`, `freeze` or `skip`; the last two
are the paper's words. It travels in the model's configuration, under the key `vllm_ext`, with one entry a layer:
`{"attention_plan": ["full", {"kind": "window", "window": 128, "sink": 4}, ..., {"kind": "skip"}]}`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

CONFIG_KEY = "vllm_ext"
ARCHITECTURE_PREFIX = "AttentionPlan"

Kind = Literal["full", "window", "freeze", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Consolidation = Literal["none", "bias", "linear"]
CONSOLIDATIONS: tuple[Consolidation, ...] = get_args(Consolidation)
SINK = 4
"""Tokens: StreamingLLM (arXiv 2309.17453) finds that as many take what attention has no use for."""
MOST_SINK = 16
"""Tokens: those of vLLM's smallest KV block in common use."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer's attention becomes.

    Raises:
        ValueError: for an unknown kind, or a setting that the kind does not have.

    """

    kind: Kind = "full"
    window: int | None = None
    """How many tokens a `window` layer sees beside its sink, its own included; a `freeze` layer may have one."""
    sink: int | None = None
    """How many of the first tokens a layer with a window sees too, however far behind: `SINK` where none is given."""
    consolidation: Consolidation = "none"
    """What a `skip` layer adds in place of its attention: nothing, a constant vector, or a linear map."""
    rank: int | None = None
    """The rank of a linear map; None is a full matrix."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.consolidation not in CONSOLIDATIONS:
            raise ValueError(f"consolidation is {self.consolidation!r}; use one of {', '.join(CONSOLIDATIONS)}")
        if self.kind == "window" and self.window is None:
            raise ValueError("a window layer has no window; say of how many tokens")
        if self.window is not None and self.kind not in ("window", "freeze"):
            raise ValueError(f"a {self.kind} layer has window {self.window}; only window and freeze layers have one")
        if self.consolidation != "none" and self.kind != "skip":
            raise ValueError(f"a {self.kind} layer has consolidation {self.consolidation}; only skip layers have one")
        if self.rank is not None and self.consolidation != "linear":
            raise ValueError(f"rank is {self.rank} with consolidation {self.consolidation}; only linear has a rank")
        if self.sink is not None and self.window is None:
            raise ValueError(
                f"a {self.kind} layer has sink {self.sink} and no window; only layers with a window have one"
            )
        if self.sink is None and self.window is not None:
            object.__setattr__(self, "sink", SINK)
        for name in ("window", "sink", "rank"):
            size = getattr(self, name)
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"{name} is {size!r}; it must be a positive whole number")
        if self.sink is not None and self.sink > MOST_SINK:
            raise ValueError(f"sink is {self.sink}; a block of the KV cache holds it, so give at most {MOST_SINK}")

    @classmethod
    def from_config(cls, entry: Any) -> Self:
        """Read one entry of the configuration: a kind, or an object with the kind and its settings.

        Raises:
            ValueError: as the constructor does, and for an entry of another form.

        """
        settings = {"kind": entry} if isinstance(entry, str) else entry
        if not isinstance(settings, dict) or not settings.keys() <= cls.__dataclass_fields__.keys():
            raise ValueError(
                f"{entry!r} is no layer's plan; use a kind, or {{'kind': ..., 'window': ..., 'sink': ...}}"
            )
        if "window" in settings and "sink" not in settings:
            raise ValueError(
                f"{entry!r} has a window without a sink, which older versions fitted; write the checkpoint anew from "
                "the stock one with vllm-ext plan"
            )
        return cls(**settings)

    def to_config(self) -> str | dict[str, Any]:
        """The shortest entry that `from_config` reads back."""
        settings = {name: value for name, value in asdict(self).items() if value != getattr(LayerPlan, name)}
        return self.kind if settings.keys() <= {"kind"} else {"kind": self.kind} | settings

    @property
    def fitted(self) -> bool:
        """Whether it needs tensors that are fitted on calibration text."""
        return self.consolidation != "none"


FULL = LayerPlan()


@dataclass(frozen=True)
class AttentionPlan:
    """The plan of each decoder layer, lowest first.

    Raises:
        ValueError: for a plan in which no layer attends, or a layer above a frozen one needs what is not there.

    """

    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not self.attending:
            raise ValueError(
                f"attention_plan skips all {len(self.layers)} layers; leave at least one full, "
                "or no token would see another"
            )
        if self.first_frozen == 0:
            raise ValueError("attention_plan freezes layer 0, below which no prompt token is seen; freeze from 1 on")
        for layer, plan in enumerate(self.layers):
            if layer > self.first_frozen and plan.kind not in ("freeze", "skip"):
                raise ValueError(
                    f"layer {layer} is {plan.kind} above layer {self.first_frozen}, which is frozen, and prompt tokens "
                    "stop there; freeze or skip it too"
                )

    @classmethod
    def of(cls, num_layers: int, changes: Mapping[int, LayerPlan] | None = None) -> Self:
        """The plan of a decoder of `num_layers` with attention in full but for `changes`, by layer.

        Raises:
            ValueError: for a layer outside 0..num_layers-1, and as the constructor does.

        """
        changes = changes or {}
        for layer in sorted(changes):
            if not 0 <= layer < num_layers:
                raise ValueError(f"layer {layer} does not exist; the model has layers 0-{num_layers - 1}")
        return cls(tuple(changes.get(layer, FULL) for layer in range(num_layers)))

    @classmethod
    def from_config(cls, section: Any, num_layers: int) -> Self:
        """Read the plan from a configuration's `section` under `CONFIG_KEY`, for a model of `num_layers`.

        Raises:
            ValueError: where there is none, it is malformed, or it is for a model of another depth.

        """
        entries = section.get("attention_plan") if isinstance(section, dict) else None
        if not isinstance(entries, list):
            raise ValueError(
                f"{CONFIG_KEY}.attention_plan is {entries!r}; it must list one of {', '.join(KINDS)} for every layer"
            )
        if len(entries) != num_layers:
            raise ValueError(
                f"attention_plan is for {len(entries)} layers but the model has {num_layers}; "
                "make the plan from this checkpoint"
            )
        layers = []
        for layer, entry in enumerate(entries):
            try:
                layers.append(LayerPlan.from_config(entry))
            except ValueError as error:
                raise ValueError(f"attention_plan[{layer}]: {error}") from error
        return cls(tuple(layers))

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> Self:
        """Read the plan of a planned model's configuration; raises as `from_config` does."""
        return cls.from_config(getattr(hf_config, CONFIG_KEY, None), hf_config.num_hidden_layers)

    def to_config(self) -> dict[str, Any]:
        """What the model's configuration holds under `CONFIG_KEY`."""
        return {"attention_plan": [plan.to_config() for plan in self.layers]}

    @property
    def attending(self) -> list[int]:
        """The layers that attend to other tokens, and so hold a KV cache."""
        return [layer for layer, plan in enumerate(self.layers) if plan.kind != "skip"]

    @property
    def skipped(self) -> list[int]:
        """The layers without attention."""
        return [layer for layer, plan in enumerate(self.layers) if plan.kind == "skip"]

    @property
    def fitted(self) -> list[int]:
        """The layers that need tensors fitted on calibration text."""
        return [layer for layer, plan in enumerate(self.layers) if plan.fitted]

    @property
    def windowed(self) -> list[int]:
        """The layers that keep a sink and a window only."""
        return [layer for layer, plan in enumerate(self.layers) if plan.window is not None]

    @property
    def first_frozen(self) -> int:
        """The lowest frozen layer, whose entering state is frozen. None frozen: the number of layers."""
        return next((layer for layer, plan in enumerate(self.layers) if plan.kind == "freeze"), len(self.layers))

    @property
    def tail_start(self) -> int:
        """The first layer of the *tail*: the layers above the last one that attends. No tail: the number of layers."""
        return self.attending[-1] + 1

    @property
    def first_partial(self) -> int:
        """The lowest layer that does not run for every position: frozen, or in the tail."""
        return min(self.first_frozen, self.tail_start)

    @property
    def has_tail(self) -> bool:
        """Whether any layer lies above the last one that attends."""
        return self.tail_start < len(self.layers)


def tensors_of(plan: LayerPlan) -> tuple[str, ...]:
    """Which fitted tensors a layer has; `tensor_name` tells their shapes."""
    if plan.consolidation == "none":
        return ()
    if plan.consolidation == "bias":
        return ("bias",)
    return ("weight", "bias") if plan.rank is None else ("down", "up", "bias")


def tensor_name(layer: int, name: str) -> str:
    """What the fitted tensor of a layer is called in a checkpoint.

    `bias` `[hidden_size]` of every consolidation, and of a linear one `weight` `[hidden_size, hidden_size]`, or `down`
    `[rank, hidden_size]` and `up` `[hidden_size, rank]`.
    """
    return f"{CONFIG_KEY}.layers.{layer}.{name}"
