"""The attention plan: what each decoder layer's attention becomes.

*Attend First, Consolidate Later* (arXiv 2409.03621, section 5) drops a layer's input norm and attention and keeps
its MLP; the paper calls this *skip*. A plan names the kind of every layer, so that any set of layers can be skipped.
It travels in the model's configuration, under the key `vllm_ext`, as `{"attention_plan": ["full", ..., "skip"]}`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

CONFIG_KEY = "vllm_ext"
ARCHITECTURE_PREFIX = "AttentionPlan"

Kind = Literal["full", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class AttentionPlan:
    """The kind of each decoder layer, lowest first.

    Raises:
        ValueError: for no layers, an unknown kind, or a plan in which no layer attends.

    """

    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        for layer, kind in enumerate(self.kinds):
            if kind not in KINDS:
                raise ValueError(f"attention_plan[{layer}] is {kind!r}; use one of {', '.join(KINDS)}")
        if not self.attending:
            raise ValueError(
                f"attention_plan skips all {len(self.kinds)} layers; leave at least one full, "
                "or no token would see another"
            )

    @classmethod
    def skipping(cls, layers: Iterable[int], num_layers: int) -> Self:
        """The plan that skips `layers` of a decoder of `num_layers`.

        Raises:
            ValueError: for a layer outside 0..num_layers-1, and as the constructor does.

        """
        skipped = set(layers)
        for layer in sorted(skipped):
            if not 0 <= layer < num_layers:
                raise ValueError(f"layer {layer} does not exist; the model has layers 0-{num_layers - 1}")
        return cls(tuple("skip" if layer in skipped else "full" for layer in range(num_layers)))

    @classmethod
    def from_config(cls, section: Any, num_layers: int) -> Self:
        """Read the plan from a configuration's `section` under `CONFIG_KEY`, for a model of `num_layers`.

        Raises:
            ValueError: where there is none, it is malformed, or it is for a model of another depth.

        """
        kinds = section.get("attention_plan") if isinstance(section, dict) else None
        if not isinstance(kinds, list):
            raise ValueError(
                f"{CONFIG_KEY}.attention_plan is {kinds!r}; it must list one of {', '.join(KINDS)} for every layer"
            )
        if len(kinds) != num_layers:
            raise ValueError(
                f"attention_plan is for {len(kinds)} layers but the model has {num_layers}; "
                "make the plan from this checkpoint"
            )
        return cls(tuple(kinds))

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> Self:
        """Read the plan of a planned model's configuration; raises as `from_config` does."""
        return cls.from_config(getattr(hf_config, CONFIG_KEY, None), hf_config.num_hidden_layers)

    def to_config(self) -> dict[str, Any]:
        """What the model's configuration holds under `CONFIG_KEY`."""
        return {"attention_plan": list(self.kinds)}

    @property
    def attending(self) -> list[int]:
        """The layers that attend to other tokens, and so hold a KV cache."""
        return [layer for layer, kind in enumerate(self.kinds) if kind != "skip"]

    @property
    def skipped(self) -> list[int]:
        """The layers without attention."""
        return [layer for layer, kind in enumerate(self.kinds) if kind == "skip"]

    @property
    def tail_start(self) -> int:
        """The first layer of the *tail*: the layers above the last one that attends. No tail: the number of layers."""
        return self.attending[-1] + 1

    @property
    def has_tail(self) -> bool:
        """Whether any layer lies above the last one that attends."""
        return self.tail_start < len(self.kinds)
