"""The slow, obvious version: transformers, one whole forward pass a token, every attention written out in full."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from model_executors.attention_plan import FULL, LayerPlan, tensor_name
from model_executors.families import family_of
from tests.answers import Answer


class Reference:
    """A model with some layers planned; `folder` may hold their fitted tensors."""

    def __init__(self, folder: Path, changes: Mapping[int, LayerPlan]) -> None:
        name = f"written_out_{id(self)}"
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, eager_mask)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.set_attn_implementation(name)
        self.changes = changes
        fitted = folder / "vllm_ext.safetensors"
        self.fitted = load_file(fitted) if fitted.exists() else {}
        self.layers = self.model.model.layers
        self.family = family_of(self.model.config.architectures[0])
        self.prompt_length = 0
        self.frozen: torch.Tensor | None = None  # the state that enters the first frozen layer
        self.frozen_kv: tuple[torch.Tensor, torch.Tensor] | None = None
        self.collecting = False
        self.held: Callable[[torch.Tensor, LayerPlan], torch.Tensor] = lambda each, _: each
        """What a layer's KV cache makes of keys or values."""
        for number, plan in changes.items():
            attention = getattr(self.layers[number], self.family.attention)
            if plan.kind == "skip":
                setattr(self.layers[number], self.family.attention, Skipped(self, number, plan))
            elif plan.kind == "freeze":
                setattr(self.layers[number], self.family.attention, Frozen(self, number, attention))
        frozen = [number for number, plan in changes.items() if plan.kind == "freeze"]
        if frozen:
            self.layers[min(frozen)].register_forward_pre_hook(self._keep_frozen_state)

    def tensor(self, layer: int, name: str) -> torch.Tensor:
        return self.fitted[tensor_name(layer, name)].float()

    def _keep_frozen_state(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.frozen = inputs[0]

    def attend(self, module, query, key, value, attention_mask, scaling, softcap=None, **unused):
        """Attention over `[1, heads, tokens, head_size]`, every score written out."""
        if self.collecting:
            self.frozen_kv = key, value
        elif self.frozen_kv is not None:
            prompt = self.prompt_length
            key, value = (
                torch.cat([frozen[:, :, :prompt], own[:, :, prompt:]], 2)
                for frozen, own in zip(self.frozen_kv, (key, value), strict=True)
            )
        plan = self.changes.get(module.layer_idx, FULL)
        key, value = self.held(key, plan), self.held(value, plan)
        heads, tokens = query.shape[1], query.shape[2]
        key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        if plan.window is not None:
            for token in range(tokens):
                scores[:, :, token, plan.sink : max(plan.sink, token - plan.window + 1)] = -torch.inf
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    @torch.no_grad()
    def answer(self, prompt: list[int], max_tokens: int) -> Answer:
        """The greedy answer, and the log-probability of each prompt token after the first."""
        self.prompt_length = len(prompt)
        tokens = list(prompt)
        logprobs = self.logprobs(tokens)
        prompt_logprobs = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        chosen = []
        for _ in range(max_tokens):
            best = self.logprobs(tokens)[-1].max(-1)
            tokens.append(int(best.indices))
            chosen.append(best.values.item())
        return Answer(tokens[len(prompt) :], chosen, prompt_logprobs)

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """`[num_tokens, vocab_size]`; where layers are frozen, only those from the prompt's last on mean anything."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)


def fp8(numbers: torch.Tensor) -> torch.Tensor:
    """As FP8 (E4M3) has them."""
    return numbers.to(torch.float8_e4m3fn).float()


def fp8_cut(numbers: torch.Tensor) -> torch.Tensor:
    """As FP8 has them, rounded towards zero: so vLLM's kernel for CPUs holds keys and values."""
    nearest = numbers.to(torch.float8_e4m3fn)
    too_far = nearest.float().abs() > numbers.abs()
    return (nearest.view(torch.uint8) - too_far.to(torch.uint8)).view(torch.float8_e4m3fn).float()


def answers_apart(
    asked: list[tuple[Path, Mapping[int, LayerPlan]]], prompts: list[list[int]], max_tokens: int
) -> list[list[Answer]]:
    """What references answer in a process of their own: vLLM's Transformers backend changes transformers' classes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_answers, asked, prompts, max_tokens).result()


def _answers(
    asked: list[tuple[Path, Mapping[int, LayerPlan]]], prompts: list[list[int]], max_tokens: int
) -> list[list[Answer]]:
    references = [Reference(folder, changes) for folder, changes in asked]
    return [[reference.answer(prompt, max_tokens) for prompt in prompts] for reference in references]


class Skipped(nn.Module):
    """Adds what the plan puts in place of attention, whatever norms stand around it."""

    def __init__(self, reference: Reference, number: int, plan: LayerPlan) -> None:
        super().__init__()
        self.number, self.plan = number, plan
        self.tensor = reference.tensor

    def forward(self, hidden_states: torch.Tensor, **unused):
        if self.plan.consolidation == "none":
            return torch.zeros_like(hidden_states), None
        bias = self.tensor(self.number, "bias")
        if self.plan.consolidation == "bias":
            return bias.expand_as(hidden_states), None
        if self.plan.rank is None:
            return hidden_states @ self.tensor(self.number, "weight").T + bias, None
        return hidden_states @ self.tensor(self.number, "down").T @ self.tensor(self.number, "up").T + bias, None


class Frozen(nn.Module):
    """Attention whose K and V of prompt tokens come from the state that enters the first frozen layer."""

    def __init__(self, reference: Reference, number: int, stock: nn.Module) -> None:
        super().__init__()
        self.stock, self.number = stock, number
        self.reference = (reference,)

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        (reference,) = self.reference
        norm = reference.family.input_norm
        frozen = reference.frozen if norm is None else getattr(reference.layers[self.number], norm)(reference.frozen)
        reference.collecting = True
        self.stock(hidden_states=frozen, **kwargs)
        reference.collecting = False
        output = self.stock(hidden_states=hidden_states, **kwargs)
        reference.frozen_kv = None
        return output
