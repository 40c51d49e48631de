"""Information injection: from which depth on an answer no longer follows a token that is exchanged for another.

*Attend First, Consolidate Later* (arXiv 2409.03621, section 4) asks for the capital of Italy and puts, at layer k, the
state of "France" from another prompt in the place of "Italy". The answer is Paris where the layers above still read it,
and Rome where they have read all they need.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_ext.offline.batch import Batch
from vllm_ext.offline.evaluator import score
from vllm_ext.offline.model import OfflineModel, PlannedModel
from vllm_ext.probe.manipulations import injected
from vllm_ext.tasks import texts
from vllm_ext.tasks.items import Item, item

SHOTS = 4
CANDIDATES = 6
"""Prompts that are tried for each pair: the model may not know the answer, or no other may be as long."""


@dataclass(frozen=True)
class Followed:
    """How answers go, pair by pair: as the prompt says, or as the injected state does; or neither."""

    prompt: list[float]
    injected: list[float]


class Pairs:
    """Prompts that differ in one country's name, of as many tokens, and whose answers the unchanged model knows."""

    def __init__(self, model: OfflineModel, tokenizer: Any, count: int, seed: int) -> None:
        self.model = model
        chosen = random.Random(seed)
        known = list(texts.capitals().items())
        examples = "".join(_asked(*each) for each in chosen.sample(known, SHOTS))
        rest = [each for each in chosen.sample(known, len(known)) if _asked(*each) not in examples]
        rest = rest[: CANDIDATES * count]
        items = [item(tokenizer, examples + texts.capital_question(country), f" {city}\n") for country, city in rest]
        alone = Batch.of(items, model.device)
        entered = model.enter(alone.tokens)
        right = [bool(each.all()) for each, _ in score(model, alone, entered.state(model, len(model.layers)))]
        by_length: dict[int, list[Item]] = {}
        for each, knows in zip(items, right, strict=True):
            if knows:
                by_length.setdefault(len(each.prompt), []).append(each)
        groups = [group for group in by_length.values() if len(group) > 1]
        pairs = [(one, group[at - 1]) for group in groups for at, one in enumerate(group)][:count]
        self.count = len(pairs)
        if not pairs:
            return
        self.positions = _differing([(one.prompt, other.prompt) for one, other in pairs])
        self.own = Batch.of([one for one, _ in pairs], model.device)
        self.others = Batch.of([Item(one.prompt, other.answer) for one, other in pairs], model.device)
        donors = Batch.of([Item(other.prompt, ()) for one, other in pairs], model.device)
        self.entered = [model.enter(batch.tokens) for batch in (self.own, self.others, donors)]

    def at(self, layer: int) -> Followed:
        """With the states that enter that layer exchanged."""
        own, others, donors = (entered.state(self.model, layer) for entered in self.entered)
        given = donors[torch.arange(self.count)[:, None], torch.tensor(self.positions)]
        found = []
        for batch, entered, states in zip((self.own, self.others), self.entered, (own, others), strict=False):
            left = PlannedModel(self.model).run(entered, injected(states, self.positions, given), layer)
            found.append([float(right.all()) for right, _ in score(self.model, batch, left)])
        for entered in self.entered:
            entered.forget(layer)
        return Followed(*found)


def _differing(prompts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[list[int]]:
    """The positions in which the two of each pair differ, filled up with the last of them to as many for each."""
    positions = [[at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b] for one, other in prompts]
    most = max(map(len, positions))
    return [each + each[-1:] * (most - len(each)) for each in positions]


def _asked(country: str, city: str) -> str:
    return f"{texts.capital_question(country)} {city}\n"
