"""The student of self-distillation: the model's top layers, its head, and what of them is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from model_executors.heads.character_head import PAD, CharacterHead
from model_executors.heads.head_plan import HeadShape, head_tensor_name
from vllm_ext.heads.states import StudentLayers
from vllm_ext.offline.model import Activations, OfflineModel, PlannedModel

ROWS_AT_ONCE = 128
RIDGE = 1e-2
"""Added to the diagonal of the least-squares fit, as a part of its mean."""


class Divergence(torch.autograd.Function):
    """The mean divergence of spelled distributions from the teacher's at some temperature, in nats, with its gradient.

    Some rows at a time, so that a row's whole vocabulary is passed over while it is still in a cache.
    """

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, leaving: torch.Tensor, student: "Student", at: float) -> torch.Tensor:
        """`places` `[rows, slots]`, log-probabilities; `leaving` `[rows, hidden_size]`, the teacher's last states."""
        head, total, gradients = student.head, places.new_zeros(()), []
        assert head is not None
        for part, states in zip(places.split(ROWS_AT_ONCE), leaving.split(ROWS_AT_ONCE), strict=True):
            teacher = (torch.cat(list(student.model.logits(states))) / at).log_softmax(-1)
            scores = head.spelling.sums(part).log_softmax(-1)
            probabilities = teacher.exp()
            total += (probabilities * teacher.sub_(scores)).sum()
            by_score = scores.exp_().sub_(probabilities)
            gradients.append(student.gathered(by_score))
        ctx.save_for_backward(torch.cat(gradients) / len(places))
        return total / len(places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """To `[rows, slots]`."""
        (by_place,) = ctx.saved_tensors
        return by_place * gradients[0], None, None, None


class Student(nn.Module):
    """From states that enter the trained layers, to log-probabilities over the vocabulary.

    `head` is None where the stock head is kept, and only layers are trained.
    """

    def __init__(self, model: OfflineModel, part: StudentLayers, head: CharacterHead | None, lora: int = 0) -> None:
        """`lora` is the rank of adapters that are trained in place of the layers' weights; 0 is none."""
        super().__init__()
        self.parts, self.part, self.head = (model,), part, head
        self.top = range(len(model.layers) - part.layers, len(model.layers))
        if head is not None:
            matrix = composition(head).t().to_sparse_csr()
            self.tokens, self.starts = matrix.col_indices().int(), matrix.crow_indices()[:-1].int()
            for name, parameter in head.named_parameters():
                parameter.requires_grad_(name != "spellings")
        self.mlps = nn.ModuleDict({str(number): _mlp(model, number) for number in self.top})
        for parameter in self.mlps.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if lora:
            linears = [name for name, module in self.mlps.named_modules() if isinstance(module, nn.Linear)]
            config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=linears)
            inject_adapter_in_model(config, self.mlps)  # it freezes all else

    @property
    def model(self) -> OfflineModel:
        """Of which the student is a part, and which is its teacher."""
        return self.parts[0]

    @property
    def pointwise(self) -> bool:
        """Whether a token's state is all that the student needs: none of its layers attends."""
        plans = self.part.plans or {}
        return all(number in plans and plans[number].kind == "skip" for number in self.top)

    def gathered(self, by_token: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab_size]` to each slot's sum over the tokens that it is in, `[rows, slots]`."""
        table = by_token.T.contiguous()
        return nn.functional.embedding_bag(self.tokens, table, self.starts, mode="sum").T

    def forward(
        self,
        entering: torch.Tensor,
        entered: Activations | None = None,
        tokens: torch.Tensor | None = None,
        leaving: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """From `[rows, hidden_size]`, or where layers attend `[passages, length, hidden_size]`, whose rows are its
        tokens: log-probabilities `[rows, vocab_size]`; with `tokens` `[rows]`, the sum of those of each one's places;
        with `leaving` `[rows, hidden_size]`, what leaves the teacher, the mean divergence from it at
        `temperature`.
        """
        flat = self._through_layers(entering, entered)
        if self.head is None:
            scores = torch.cat(list(self.model.logits(flat))).log_softmax(-1)
            if leaving is None:
                return scores
            with torch.no_grad():
                teacher = (torch.cat(list(self.model.logits(leaving))) / temperature).log_softmax(-1)
            return nn.functional.kl_div(scores, teacher, log_target=True, reduction="batchmean")
        logits = self.head.logits(self.model.normed(flat).to(self.head.weight.dtype)).float()
        places = self.head.spelling.log_probabilities(logits)
        if tokens is not None:
            padded = nn.functional.pad(places, (0, 1))
            return padded.gather(1, self.head.spellings[tokens].long() % padded.shape[1]).sum(1)
        if leaving is not None:
            return Divergence.apply(places, leaving, self, temperature)
        return self.head.spelling.sums(places).log_softmax(-1)

    def _through_layers(self, states: torch.Tensor, entered: Activations | None) -> torch.Tensor:
        """To what leaves the last layer, `[rows, hidden_size]`."""
        if self.part.layers:
            if entered is None:  # no layer attends, so what is made for any tokens will do
                states = states[None]
                entered = self.model.enter(torch.zeros(states.shape[:2], dtype=torch.long, device=states.device))
            changed = PlannedModel(self.model, self.part.plans, self.part.fitted)
            for number in self.top:
                states = changed.layer(number, states, entered)
        return states.flatten(0, -2)

    def merge(self) -> None:
        """Add adapters to the weights that they are of, and be rid of them."""
        for name, module in list(self.mlps.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(self.mlps.get_submodule(parent), attribute, module.get_base_layer())

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
    matrix = composition(head)
    gram = (matrix.t() @ matrix).to_dense()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    head.weight.data.copy_(torch.linalg.solve(gram, matrix.t() @ stock.float()))
    if head.shape.width:
        nn.init.normal_(head.gate_up, std=head.shape.hidden_size**-0.5)
        nn.init.zeros_(head.down)


def new_head(shape: HeadShape, spellings: torch.Tensor, device: torch.device) -> CharacterHead:
    """A head in float32, to be trained."""
    head = CharacterHead(shape, torch.float32, device)
    head.spellings.data.copy_(spellings)
    head.prepare()
    return head


def composition(head: CharacterHead) -> torch.Tensor:
    """`[vocab_size, slots]`, sparse: a one for each symbol of each token."""
    spelled = head.spellings != PAD
    tokens, slots = spelled.nonzero()[:, 0], head.spellings[spelled].long()
    ones = torch.ones(len(tokens), device=tokens.device)
    size = (head.shape.vocab_size, sum(head.shape.slots))
    return torch.sparse_coo_tensor(torch.stack([tokens, slots]), ones, size, check_invariants=False).coalesce()


def _mlp(model: OfflineModel, number: int) -> nn.Module:
    """What of a layer is neither attention nor norm."""
    layer = model.layers[number]
    parts: Mapping[str, nn.Module] = dict(layer.named_children())
    kept = {name: part for name, part in parts.items() if name != model.family.attention and "norm" not in name}
    return nn.ModuleDict(kept)
