"""The head's plan: what turns the last state into logits. It travels beside the attention plan, as `vllm_ext.head`."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from model_executors.attention_plan import CONFIG_KEY

GROUP = 32
"""Weights of the screened head's copy that share a scale."""
SPELLING_BYTES = 2
"""Of a slot's number."""

HeadKind = Literal["stock", "character", "rescored", "screened"]
"""`character` spells the next token, and `rescored` spells a shortlist that the stock head's own rows score."""
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
CHARACTER_HEADS: tuple[HeadKind, ...] = ("character", "rescored")
"""Those with character heads."""


@dataclass(frozen=True)
class HeadShape:
    """The sizes of character heads.

    Raises:
        ValueError: for sizes below one.

    """

    hidden_size: int
    vocab_size: int
    slots: tuple[int, ...]
    """How many symbols each place's head tells apart, first place first."""
    width: int = 0
    """Of the gated block between the model's last state and the heads; 0 is none."""

    def __post_init__(self) -> None:
        if not self.slots or min(self.hidden_size, self.vocab_size, *self.slots) < 1 or self.width < 0:
            raise ValueError(f"character heads of {self}: sizes are 1 or more")

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name: `spellings` are each token's slots, all else are weights."""
        block = {"gate_up": (2 * self.width, self.hidden_size), "down": (self.hidden_size, self.width)}
        return {
            "spellings": (self.vocab_size, len(self.slots)),
            "weight": (sum(self.slots), self.hidden_size),
            "bias": (sum(self.slots),),
            **(block if self.width else {}),
        }


@dataclass(frozen=True)
class HeadPlan:
    """Which head, and its sizes.

    Raises:
        ValueError: for an unknown kind, or sizes and thresholds that cannot be.

    """

    kind: HeadKind = "stock"
    slots: tuple[int, ...] = ()
    """Of character heads: how many symbols each place's head tells apart."""
    width: int = 0
    """Of character heads: of the gated block before them; 0 is none."""
    threshold: float = 0.0
    """Of character heads: rows that they are less sure of go to the stock head; 0 is none, 1 all. How sure is the
    probability of the best spelled token, or where the shortlist is rescored of all that is on it."""
    shortlist: int = 256
    """Of the rescored and the screened head: how many tokens get their exact scores."""

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise ValueError(f"head is {self.kind!r}; use one of {', '.join(HEAD_KINDS)}")
        if not (isinstance(self.slots, tuple) and all(type(each) is int and each > 0 for each in self.slots)):
            raise ValueError(f"slots is {self.slots!r}; it is a list of how many symbols each place's head tells apart")
        if type(self.width) is not int or self.width < 0:
            raise ValueError(f"width is {self.width!r}; it is 0 or more")
        if self.is_character and not self.slots:
            raise ValueError(
                f"head is {self.kind} but the checkpoint has no character heads; train them with vllm-ext heads train"
            )
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; it is a probability, from 0 to 1")
        if type(self.shortlist) is not int or self.shortlist < 1:
            raise ValueError(f"shortlist is {self.shortlist!r}; choose 1 or more")

    @property
    def is_character(self) -> bool:
        """Whether it has character heads."""
        return self.kind in CHARACTER_HEADS

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> Self:
        """Read a configuration's head; the stock one where it names none.

        Raises:
            ValueError: as the constructor does, and for an entry of another form.

        """
        section = getattr(hf_config, CONFIG_KEY, None)
        return cls.from_config(section.get("head") if isinstance(section, dict) else None)

    @classmethod
    def from_config(cls, entry: Any) -> Self:
        """Read the entry `head`: a kind, or an object with the kind and its settings; None is the stock head."""
        settings = {"kind": entry} if isinstance(entry, str) else entry or {}
        if not isinstance(settings, dict) or not settings.keys() <= {field.name for field in fields(cls)}:
            raise ValueError(f"{entry!r} is no head; use one of {', '.join(HEAD_KINDS)}, or {{'kind': ...}}")
        slots = settings.get("slots", [])
        return cls(**settings | {"slots": tuple(slots) if isinstance(slots, list) else slots})

    def shape(self, hidden_size: int, vocab_size: int) -> HeadShape:
        """Of character heads for a model of these sizes."""
        return HeadShape(hidden_size, vocab_size, self.slots, self.width)

    def bytes(self, hidden_size: int, vocab_size: int, element_bytes: int) -> int:
        """What it holds beside the stock head, in an engine whose weights take `element_bytes` each."""
        if self.kind == "screened":
            # Half a byte a weight, and for each group of them a scale and a zero in bfloat16.
            return vocab_size * hidden_size // 2 + vocab_size * (hidden_size // GROUP) * 4
        if self.kind == "stock":
            return 0
        tensors = self.shape(hidden_size, vocab_size).tensors
        return sum(
            math.prod(size) * (SPELLING_BYTES if name == "spellings" else element_bytes)
            for name, size in tensors.items()
        )

    def to_config(self) -> dict[str, Any]:
        """The shortest entry that `from_config` reads back."""
        settings = {name: value for name, value in asdict(self).items() if value != getattr(HeadPlan, name)}
        return settings | ({"slots": list(self.slots)} if self.slots else {})


def head_tensor_name(name: str) -> str:
    """What a tensor of the head is called in a checkpoint; `HeadShape.tensors` tells their shapes."""
    return f"{CONFIG_KEY}.head.{name}"
