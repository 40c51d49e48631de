"""Character heads: small heads that spell the next token, in place of the projection to the whole vocabulary.

*SpeLLM* (arXiv 2507.16323, section 3): head p gives the distribution of the token's p-th character, and a token's score
is the sum of its characters' log-probabilities. Here a character is a symbol of `vllm_ext/heads/vocabulary.py`, and a
head has weights only for the symbols that some token has in its place, its *slots*. The score is thus a linear map of
few numbers, whose matrix has a one for each symbol of each token: the sums of all V tokens are taken in one pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from model_executors.heads.head_plan import HeadShape

ROWS_AT_ONCE = 32
"""Rows whose sums are taken together: more of them leave a CPU's cache."""
PAD = -1
"""In `spellings`: no symbol, since the token has ended."""


class Spelling(nn.Module):
    """The sums of every token's symbols.

    `spellings` `[vocab_size, places]` are each token's slots, in the order of its places, and `PAD` after the last one.
    """

    slots: torch.Tensor
    """Those of all tokens, one token after the other."""
    offsets: torch.Tensor
    """`[vocab_size]`: where each token's begin."""
    by_place: torch.Tensor
    """`[places, vocab_size]`: each token's slot in every place, or one more than there are."""
    grid: torch.Tensor
    """`[slots]`: where each slot's logit stands when all places are laid out equally wide."""

    def __init__(self, spellings: torch.Tensor, shape: HeadShape) -> None:
        super().__init__()
        spelled = spellings != PAD
        self.compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.places, self.widest = len(shape.slots), max(shape.slots)
        lengths = spelled.sum(1)
        starts = (torch.arange(self.places) * self.widest).tolist()
        grid = [torch.arange(number) + start for number, start in zip(shape.slots, starts, strict=True)]
        self.register_buffer("slots", spellings[spelled].int(), persistent=False)
        self.register_buffer("offsets", (lengths.cumsum(0) - lengths).int(), persistent=False)
        self.register_buffer("grid", torch.cat(grid), persistent=False)
        by_place = torch.where(spelled, spellings, sum(shape.slots)).T.contiguous()
        self.register_buffer("by_place", by_place.int(), persistent=False)

    def compile_sums(self) -> None:
        """Take the sums by compiled kernels from now on: numba's on a CPU, see there for which processes that is for,
        and torch's elsewhere.
        """
        if self.slots.device.type == "cpu":
            from model_executors.heads.compiled_sums import CompiledSums

            self.compiled = CompiledSums(self.slots, self.offsets)
        else:
            gather = torch.compile(gathered_sums, dynamic=True)

            def compiled(log_probabilities: torch.Tensor) -> torch.Tensor:
                torch._dynamo.decorators.mark_unbacked(log_probabilities, 0)  # or one row would be compiled anew
                return gather(log_probabilities, self.by_place)

            self.compiled = compiled

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]`: each place's logits to its log-probabilities."""
        grid = logits.new_full((len(logits), self.places * self.widest), -torch.inf)
        grid[:, self.grid] = logits
        return grid.unflatten(1, (self.places, self.widest)).log_softmax(-1).flatten(1)[:, self.grid]

    def sums(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to every token's score, `[rows, vocab_size]`; in float32."""
        if self.compiled is not None and len(log_probabilities):
            return self.compiled(log_probabilities.float())
        if not len(log_probabilities):
            return log_probabilities.new_empty(0, len(self.offsets), dtype=torch.float32)
        if self.slots.device.type != "cpu":
            return gathered_sums(log_probabilities.float(), self.by_place)
        parts = [
            nn.functional.embedding_bag(self.slots, _upright(part), self.offsets, mode="sum").T.contiguous()
            for part in log_probabilities.float().split(ROWS_AT_ONCE)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def gathered_sums(log_probabilities: torch.Tensor, by_place: torch.Tensor) -> torch.Tensor:
    """`[rows, slots]` in float32 and `[places, vocab_size]` to `[rows, vocab_size]`, place after place.

    Plain gathers, which compile to one kernel, and which the host need not wait for: the form for GPUs.
    """
    padded = nn.functional.pad(log_probabilities, (0, 1))  # what a token that has ended gathers
    total = padded[:, by_place[0]]
    for slots in by_place[1:]:
        total = total + padded[:, slots]
    return total


def _upright(rows: torch.Tensor) -> torch.Tensor:
    """`[rows, slots]` to `[slots, rows]`, in strides that torch's fast kernel takes for a single row too."""
    return rows.T.reshape(-1).view(-1, len(rows))


class CharacterHead(nn.Module):
    """From the model's last state to the log-probabilities of all tokens, normalised over the vocabulary.

    The tensors of `HeadShape.tensors` are its parameters; `prepare` must be called once they are there.
    """

    spelling: Spelling
    spellings: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter
    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, shape: HeadShape, dtype: torch.dtype, device: Any = None) -> None:
        super().__init__()
        self.shape = shape
        for name, size in shape.tensors.items():
            tensor = torch.zeros(size, dtype=torch.int16 if name == "spellings" else dtype)
            self.register_parameter(name, nn.Parameter(tensor.to(device), requires_grad=False))

    def prepare(self) -> None:
        """Prepare the sums, from `spellings`."""
        self.spelling = Spelling(self.spellings.cpu(), self.shape).to(self.weight.device)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` to each slot's logit, `[rows, slots]`."""
        if self.shape.width:
            gate, up = (hidden_states @ self.gate_up.T).chunk(2, -1)
            hidden_states = hidden_states + (nn.functional.silu(gate) * up) @ self.down.T
        return nn.functional.linear(hidden_states, self.weight, self.bias)

    def log_probabilities(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` to each place's log-probabilities, `[rows, slots]`, in float32."""
        return self.spelling.log_probabilities(self.logits(hidden_states).float())

    def scores(self, log_probabilities: torch.Tensor) -> torch.Tensor:
        """`[rows, slots]` to log-probabilities over the vocabulary, `[rows, vocab_size]`, in float32."""
        return self.spelling.sums(log_probabilities).log_softmax(-1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden_size]` to log-probabilities over the vocabulary, `[rows, vocab_size]`, in float32."""
        return self.scores(self.log_probabilities(hidden_states))


def with_exact(scores: torch.Tensor, tokens: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Share out the probability of `tokens` `[rows, k]` among them as the logits `exact` `[rows, k]` have it.

    `scores` `[rows, vocab_size]` are log-probabilities in float32, and are changed in place. Where `tokens` are a row's
    best, the best of all is one of them afterwards too. Returns the log-probability that they have together, `[rows]`:
    how sure it is that none of the others is the best.
    """
    together = scores.gather(1, tokens).logsumexp(-1, keepdim=True)
    scores.scatter_(1, tokens, exact.log_softmax(-1) + together)
    return together[:, 0]


def rescore(scores: torch.Tensor, shortlist: int, exact: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`with_exact` for each row's `shortlist` best tokens, whose logits `exact` gives, `[rows, k]` for `[rows, k]`."""
    tokens = scores.topk(min(shortlist, scores.shape[1]), sorted=False).indices
    return with_exact(scores, tokens, exact(tokens))


def slots_of(spellings: Sequence[Sequence[int]], places: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """`spellings` `[vocab_size, places]` in slots, from those in symbols, and how many slots each place has."""
    used = [sorted({spelled[place] for spelled in spellings if len(spelled) > place}) for place in range(places)]
    used = [symbols for symbols in used if symbols]
    starts = torch.tensor([0, *map(len, used)]).cumsum(0).tolist()
    slots = [
        {symbol: start + i for i, symbol in enumerate(symbols)}
        for start, symbols in zip(starts[:-1], used, strict=True)
    ]
    found = torch.full((len(spellings), len(slots)), PAD, dtype=torch.int16)
    for row, spelled in zip(found, spellings, strict=True):
        row[: len(spelled)] = torch.tensor([slots[place][symbol] for place, symbol in enumerate(spelled)])
    return found, tuple(map(len, slots))
