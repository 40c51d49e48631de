"""The student of self-distillation: the model's top layers, its head, and what of them is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model_executors.character_head import PAD, CharacterHead
from model_executors.head_plan import HeadShape, head_tensor_name
from vllm_ext.offline import Changed, Entered, OfflineModel
from vllm_ext.spell.states import Part

RIDGE = 1e-2
"""Added to the diagonal of the least-squares fit, as a part of its mean."""


class Composition(torch.autograd.Function):
    """`Spelling.sums` with a backward pass of one sparse product; torch's own takes ten times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, log_probabilities: torch.Tensor, head: CharacterHead, transposed: torch.Tensor) -> Any:
        """`[rows, slots]` to `[rows, vocab_size]`."""
        ctx.transposed = transposed
        return head.spelling.sums(log_probabilities)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """`[rows, vocab_size]` to `[rows, slots]`."""
        return (ctx.transposed @ gradients[0].T.contiguous()).T, None, None


class Student(nn.Module):
    """From states that enter the trained layers, to log-probabilities over the vocabulary.

    `head` is None where the stock head is kept, and only layers are trained.
    """

    def __init__(self, model: OfflineModel, part: Part, head: CharacterHead | None) -> None:
        super().__init__()
        self.parts, self.part, self.head = (model,), part, head
        self.top = range(len(model.layers) - part.layers, len(model.layers))
        if head is not None:
            self.transposed = _transposed(head)
            for name, parameter in head.named_parameters():
                parameter.requires_grad_(name != "spellings")
        self.mlps = nn.ModuleDict({str(number): _mlp(model, number) for number in self.top})
        for parameter in self.mlps.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    @property
    def model(self) -> OfflineModel:
        """Of which the student is a part, and which is its teacher."""
        return self.parts[0]

    @property
    def pointwise(self) -> bool:
        """Whether a token's state is all that the student needs: none of its layers attends."""
        plans = self.part.plans or {}
        return all(number in plans and plans[number].kind == "skip" for number in self.top)

    def forward(
        self, entering: torch.Tensor, entered: Entered | None = None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[rows, hidden_size]` to log-probabilities `[rows, vocab_size]`, or to the sum of those of the places of
        `tokens` `[rows]`; where layers attend `[passages, length, hidden_size]`, and rows are all their tokens.
        """
        states = entering
        if self.part.layers:
            assert entered is not None
            changed = Changed(self.model, self.part.plans, self.part.fitted)
            for number in self.top:
                states = changed.layer(number, states, entered)
        flat = states.flatten(0, -2)
        if self.head is None:
            return torch.cat(list(self.model.logits(flat))).log_softmax(-1)
        logits = self.head.logits(self.model.normed(flat).to(self.head.weight.dtype)).float()
        places = self.head.spelling.log_probabilities(logits)
        if tokens is not None:
            padded = nn.functional.pad(places, (0, 1))
            return padded.gather(1, self.head.spellings[tokens].long() % padded.shape[1]).sum(1)
        return Composition.apply(places, self.head, self.transposed).log_softmax(-1)

    def to_dtype(self, dtype: torch.dtype) -> None:
        """Round what was trained to what it will be served in."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """The head's, by their names in a checkpoint."""
        parameters = self.head.named_parameters() if self.head is not None else ()
        return {head_tensor_name(name): parameter.detach().cpu().contiguous() for name, parameter in parameters}

    def layer_tensors(self) -> dict[str, torch.Tensor]:
        """Those of the trained layers, by the names that the model's own have in a checkpoint."""
        return {
            f"model.layers.{name}": parameter.detach().cpu().contiguous()
            for name, parameter in self.mlps.named_parameters()
        }


def begin(head: CharacterHead, stock: torch.Tensor) -> None:
    """Set the heads to the least-squares fit of their composition to the stock head's rows `[vocab_size, hidden]`."""
    transposed = _transposed(head)
    gram = (transposed @ transposed.to_dense().T).float()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    head.weight.data.copy_(torch.linalg.solve(gram, transposed @ stock.float()))
    if head.shape.width:
        nn.init.normal_(head.gate_up, std=head.shape.hidden_size**-0.5)
        nn.init.zeros_(head.down)


def new_head(shape: HeadShape, spellings: torch.Tensor, device: torch.device) -> CharacterHead:
    """A head in float32, to be trained."""
    head = CharacterHead(shape, torch.float32, device)
    head.spellings.data.copy_(spellings)
    head.spell()
    return head


def _transposed(head: CharacterHead) -> torch.Tensor:
    """The composition's matrix, `[slots, vocab_size]`, sparse."""
    spelled = head.spellings != PAD
    tokens = spelled.nonzero()[:, 0]
    slots = head.spellings[spelled].long()
    ones = torch.ones(len(tokens), device=tokens.device)
    size = (sum(head.shape.slots), head.shape.vocab_size)
    return torch.sparse_coo_tensor(torch.stack([slots, tokens]), ones, size).to_sparse_csr()


def _mlp(model: OfflineModel, number: int) -> nn.Module:
    """What of a layer is neither attention nor norm."""
    layer = model.layers[number]
    parts: Mapping[str, nn.Module] = dict(layer.named_children())
    kept = {name: part for name, part in parts.items() if name != model.family.attention and "norm" not in name}
    return nn.ModuleDict(kept)
