"""Character heads with random weights, and the slow, obvious version of them."""

import math
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from model_executors.attention_plan import LayerPlan
from model_executors.heads.character_head import slots_of
from model_executors.heads.head_plan import HeadKind, HeadPlan, HeadShape, head_tensor_name
from tests.fitted import write_random
from tests.reference import Reference
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.planned_checkpoint import Fit, Trained, write_planned

PLACES = 4
LETTERS = 7
SHORTLIST = 24


def random_spellings(tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Different spellings of 1 to 4 symbols; those of less than 4 end with a symbol of its own."""
    chosen = random.Random(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < tokens:
        spelled = tuple(chosen.randrange(LETTERS) for _ in range(chosen.randint(1, PLACES)))
        found.setdefault((*spelled, LETTERS) if len(spelled) < PLACES else spelled)
    return list(found)


def random_tensors(shape: HeadShape, spellings: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """The head's tensors by name; wide enough that greedy choices are clear."""
    chosen = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(size, generator=chosen) / math.sqrt(size[-1])
        for name, size in shape.tensors.items()
        if name != "spellings"
    }
    return {"spellings": spellings, **tensors}


def write_with_heads(
    stock: Path, out: Path, changes: Mapping[int, LayerPlan], threshold: float = 0.0, kind: HeadKind = "character"
) -> Path:
    """Write `stock` with a random plan as `write_random` does, and random character heads."""
    source = Checkpoint.open(str(stock), weights=True)
    spellings, slots = slots_of(random_spellings(source.config["vocab_size"]), PLACES)
    head = HeadPlan(kind, slots=slots, width=24, threshold=threshold, shortlist=SHORTLIST)
    shape = head.shape(source.config["hidden_size"], source.config["vocab_size"])
    tensors = {head_tensor_name(name): each for name, each in random_tensors(shape, spellings).items()}
    planned = write_random(stock, out.with_name(f"{out.name}-without"), changes)
    fitted = planned / "vllm_ext.safetensors"
    plan = source.planned(changes)
    fit = Fit(load_file(fitted), {"text": "random"}) if plan.fitted else None
    write_planned(source, plan, out, fit, Trained(head, tensors, {}, {"text": "random"}))
    return out


def character_logprobs(
    tensors: Mapping[str, torch.Tensor], slots: tuple[int, ...], state: torch.Tensor
) -> torch.Tensor:
    """`[hidden_size]` to `[vocab_size]`, token by token and symbol by symbol."""
    if "gate_up" in tensors:
        gate, up = (tensors["gate_up"] @ state).chunk(2)
        state = state + tensors["down"] @ (torch.nn.functional.silu(gate) * up)
    places = torch.cat([part.log_softmax(0) for part in (tensors["weight"] @ state + tensors["bias"]).split(slots)])
    scores = [sum(places[slot] for slot in spelled.tolist() if slot >= 0) for spelled in tensors["spellings"]]
    return torch.stack(scores).log_softmax(0)


def rescored_row(spelled: torch.Tensor, exact: torch.Tensor, shortlist: int) -> torch.Tensor:
    """`[vocab_size]`: the best spelled tokens keep their probability together, and share it as `exact` has it."""
    best = sorted(range(len(spelled)), key=spelled.tolist().__getitem__, reverse=True)[:shortlist]
    together = sum(math.exp(spelled[token]) for token in best)
    weights = [math.exp(exact[token]) for token in best]
    row = spelled.clone()
    for token, weight in zip(best, weights, strict=True):
        row[token] = math.log(together * weight / sum(weights))
    return row


class CharacterReference(Reference):
    """A model whose head spells, and falls back to its own head below a threshold."""

    def __init__(self, folder: Path, changes: Mapping[int, LayerPlan]) -> None:
        super().__init__(folder, changes)
        self.head = Checkpoint.open(str(folder), weights=True).head
        self.tensors = {name: self.fitted[head_tensor_name(name)] for name in self._names()}
        self.fallbacks = 0

    def _names(self) -> list[str]:
        return [name.rsplit(".", 1)[1] for name in self.fitted if name.startswith(head_tensor_name(""))]

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """`[num_tokens, vocab_size]`"""
        states = self.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        rows = [character_logprobs(self.tensors, self.head.slots, state) for state in states]
        stock = self.model.lm_head(states).float().log_softmax(-1)
        if self.head.kind == "rescored":
            sure = [row.exp().sort(descending=True).values[: self.head.shortlist].sum().item() for row in rows]
            rows = [rescored_row(row, exact, self.head.shortlist) for row, exact in zip(rows, stock, strict=True)]
        else:
            sure = [row.max().exp().item() for row in rows]
        unsure = [each < self.head.threshold or self.head.threshold == 1 for each in sure]
        self.fallbacks += unsure[-1]
        return torch.stack(
            [stock[i] if below else row for i, (row, below) in enumerate(zip(rows, unsure, strict=True))]
        )
