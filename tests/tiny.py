"""Tiny random models of every family in the table, and the prompts that the tests give them."""

import random
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

NUM_LAYERS = 6
VOCAB_SIZE = 256

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that layers matter and greedy choices are clear
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)}

CONFIGS = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma2": ("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "Gemma3": ("Gemma3TextConfig", {**SLIDING, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "Phi3": ("Phi3Config", {"original_max_position_embeddings": 512}),
}

# Every edge of vLLM's blocks of 128 tokens and of the sliding window of 16, and nothing but one token.
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 200)


def write_tiny(family: str, folder: Path) -> None:
    """Write a random float32 checkpoint of `family`; the same one every time."""
    config_class, changes = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SHAPE | changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    """Random prompts of those lengths, without special tokens."""
    chosen = random.Random(seed)
    return [[chosen.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
