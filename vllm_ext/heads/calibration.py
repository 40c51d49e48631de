"""When to believe a spelling: thresholds of confidence, chosen on held-out text for a stated agreement."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table

from model_executors.heads.head_plan import CHARACTER_HEADS, HeadKind

AGREEMENTS = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
TOPS = (4, 16, 64, 256)
"""How far down the teacher's best is looked for."""


@dataclass(frozen=True)
class Comparison:
    """Held-out tokens: how the student did, `[tokens]` each."""

    confidence: torch.Tensor
    """The probability of its best token, or of all that are rescored."""
    agrees: torch.Tensor
    """Whether that is the teacher's best."""
    rank: torch.Tensor
    """Of the teacher's best among its tokens; 0 is the best."""
    divergence: torch.Tensor
    """From the teacher, in nats."""

    @classmethod
    def of(cls, scores: torch.Tensor, teacher: torch.Tensor, confidence: torch.Tensor | None = None) -> Self:
        """Of log-probabilities `[tokens, vocab_size]`; `confidence` `[tokens]` in place of the best one's."""
        highest, best = scores.max(-1)
        confidence = highest if confidence is None else confidence
        right = teacher.argmax(-1, keepdim=True)
        rank = (scores > scores.gather(1, right)).sum(-1)
        divergence = (teacher.exp() * (teacher - scores)).sum(-1)
        return cls(confidence.exp().cpu(), (best == right[:, 0]).cpu(), rank.cpu(), divergence.cpu())

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Of all parts' tokens."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def figures(self) -> dict[str, float]:
        """Means over the tokens, by name."""
        within = {f"in_top_{number}": (self.rank < number).double().mean().item() for number in TOPS}
        means = {"agreement": self.agrees.double().mean().item(), "divergence": self.divergence.double().mean().item()}
        return {"tokens": len(self.rank), **means, **within}


@dataclass(frozen=True)
class Threshold:
    """A threshold, and what it comes to on the text that it was chosen on."""

    agreement: float
    """What was asked for."""
    threshold: float
    reached: float
    """The part of tokens whose best is the teacher's, those that fall back included."""
    fallback: float
    """The part of tokens that fall back."""


def calibrated(judged: Mapping[HeadKind, Comparison]) -> dict[str, Any]:
    """What a checkpoint keeps of how its heads did, by kind."""
    rows = [
        {"head": kind} | asdict(each) for kind in judged if kind in CHARACTER_HEADS for each in thresholds(judged[kind])
    ]
    return {"judged": {kind: each.figures() for kind, each in judged.items()}, "calibration": rows}


def thresholds(judged: Comparison, agreements: Sequence[float] = AGREEMENTS) -> list[Threshold]:
    """The lowest threshold that reaches each agreement; 1 falls back for all."""
    return [threshold_for(judged, agreement) for agreement in agreements]


def threshold_for(judged: Comparison, agreement: float) -> Threshold:
    """The lowest threshold that reaches the agreement."""
    tokens = len(judged.confidence)
    confidence, order = judged.confidence.double().sort()
    wrong = ~judged.agrees[order]
    thresholds = torch.cat([confidence.new_zeros(1), confidence.unique()])
    below = torch.searchsorted(confidence, thresholds)
    # What is wrong among the tokens that are believed stays wrong.
    left = wrong.sum() - torch.cat([torch.zeros(1, dtype=torch.long), wrong.cumsum(0)])[below]
    reached = (left <= (1 - agreement) * tokens).nonzero()[:, 0]
    if agreement >= 1 or not len(reached):
        return Threshold(agreement, 1.0, 1.0, 1.0)
    first = reached[0]
    return Threshold(agreement, thresholds[first].item(), 1 - left[first].item() / tokens, below[first].item() / tokens)


def print_calibrated(found: Mapping[str, Any], name: str) -> None:
    """How often each kind of head is right, and what falls back for each agreement."""
    table = Table(title=f"{name}: rows that fall back to the stock head, for an agreement with it")
    heads = [kind for kind in found["judged"] if kind in CHARACTER_HEADS]
    for column in ("--agreement", *(f"--head {kind}" for kind in heads)):
        table.add_column(column, justify="right")
    table.add_row("without fallback", *(f"agrees {found['judged'][kind]['agreement']:.3f}" for kind in heads))
    for agreement in AGREEMENTS:
        rows = {row["head"]: row["fallback"] for row in found["calibration"] if row["agreement"] == agreement}
        table.add_row(f"{agreement:g}", *(f"{rows[kind]:.3f}" for kind in heads))
    Console().print(table)
