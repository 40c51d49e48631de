"""A tiny model that is trained on the spot to say what was told once, long ago, and that fetches it in one layer.

A text is lower-case letters, one capital among them, and a question mark, after which the capital is to follow. One
layer learns that alone; then it stands among others that attend too, at random, and change little.
"""

import random
import string
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tokenizer

LAYERS = 4
FETCHES = 1
WINDOW = 8
CAPITALS = "ABCDEFGH"
STEPS = 80
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def text(chosen: random.Random, length: int) -> tuple[str, str]:
    """A prompt of `length` characters and its answer, which lies farther back than a window and behind a sink."""
    letters = chosen.choices(string.ascii_lowercase, k=length - 1)
    answer = chosen.choice(CAPITALS)
    letters[chosen.randrange(WINDOW, length - 2 * WINDOW)] = answer
    return "".join(letters) + "?", answer


def write_copying(folder: Path) -> Path:
    """Train it, and write its checkpoint; the same one every time."""
    torch.manual_seed(0)
    alone = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE))
    chosen = random.Random(0)
    optimizer = torch.optim.AdamW(alone.parameters(), 5e-3)
    for _ in range(STEPS):
        texts = [text(chosen, 40) for _ in range(64)]
        tokens = torch.tensor([[ord(each) for each in prompt] for prompt, _ in texts])
        answers = torch.tensor([ord(answer) for _, answer in texts])
        loss = torch.nn.functional.cross_entropy(alone(tokens, logits_to_keep=1).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **SHAPE))
    for layer in whole.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.01
        layer.mlp.down_proj.weight.data *= 0.01
    learned = {name.replace("layers.0.", f"layers.{FETCHES}."): each for name, each in alone.state_dict().items()}
    whole.load_state_dict(learned, strict=False)
    whole.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
