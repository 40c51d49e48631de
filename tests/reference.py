"""The slow, obvious version: transformers, one whole forward pass a token, and skipped attentions that add zero."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.answers import Answer


class NoAttention(nn.Module):
    """Adds nothing to the stream, whatever norms stand around it."""

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        return torch.zeros_like(hidden_states), None


class Reference:
    """A model with some layers' attention taken out."""

    def __init__(self, folder: Path, skip: list[int]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        for layer in skip:
            self.model.model.layers[layer].self_attn = NoAttention()

    @torch.no_grad()
    def answer(self, prompt: list[int], max_tokens: int) -> Answer:
        """The greedy answer, and the log-probability of each prompt token after the first."""
        tokens = list(prompt)
        logprobs = self.logprobs(tokens)
        prompt_logprobs = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        for _ in range(max_tokens):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return Answer(tokens[len(prompt) :], prompt_logprobs)

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """`[num_tokens, vocab_size]`."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
