"""Tiny random models of every family in the table, and the prompts that the tests give them."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

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

TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}
# vLLM's Cohere sees one token more in a sliding window than transformers' does, so here the window sees all.
COHERE = {**TIED, **SLIDING, "sliding_window": 511, "logit_scale": 0.25}

CONFIGS = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma2": ("Gemma2Config", {**SLIDING, **TIED, "query_pre_attn_scalar": 32}),
    "Gemma3": ("Gemma3TextConfig", {**SLIDING, **TIED, "query_pre_attn_scalar": 32}),
    "Phi3": ("Phi3Config", {"original_max_position_embeddings": 512}),
    "Apertus": ("ApertusConfig", {}),
    "Cohere": ("CohereConfig", {**TIED, "logit_scale": 0.25}),
    "Cohere2": ("Cohere2Config", COHERE),
    "Cohere2Moe": ("Cohere2MoeConfig", {**COHERE, **EXPERTS}),
    "Ernie4_5": ("Ernie4_5Config", {}),
    "Ernie4_5_Moe": ("Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}),
    "Exaone4": ("Exaone4Config", SLIDING),
    "ExaoneMoe": ("ExaoneMoeConfig", {**SLIDING, **EXPERTS}),
    "Gemma": ("GemmaConfig", TIED),
    "Glm4": ("Glm4Config", {}),
    "Glm4Moe": ("Glm4MoeConfig", {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "Granite": ("GraniteConfig", GRANITE),
    "GraniteMoe": ("GraniteMoeConfig", {**GRANITE, **LOCAL_EXPERTS}),
    "GraniteMoeShared": ("GraniteMoeSharedConfig", {**GRANITE, **LOCAL_EXPERTS, "shared_intermediate_size": 96}),
    "HyperCLOVAX": ("HyperCLOVAXConfig", {**GRANITE, "logits_scaling": 0.25}),
    "IQuestCoder": ("LlamaConfig", {}),
    "InternLM3": ("LlamaConfig", {}),
    "Llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
        | {"intermediate_size_mlp": 192, "attention_chunk_size": 128},
    ),
    "Ministral3": ("Ministral3Config", {}),
    "Mixtral": ("MixtralConfig", LOCAL_EXPERTS),
    "Nemotron": ("NemotronConfig", {"hidden_act": "relu2"}),
    "Olmoe": ("OlmoeConfig", EXPERTS),
    # vLLM's class always has the biases.
    "PhiMoE": ("PhimoeConfig", {**LOCAL_EXPERTS, "lm_head_bias": True, "attention_bias": True}),
    "Qwen2Moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 96}),
    "Qwen3Moe": ("Qwen3MoeConfig", {**EXPERTS, "norm_topk_prob": True}),
    "StableLm": ("StableLmConfig", {}),
    "TeleChat3": ("LlamaConfig", {}),
    "Arcee": ("ArceeConfig", {}),
    "Cwm": ("CwmConfig", {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "Glm": ("GlmConfig", {}),
    "HunYuanDenseV1": ("HunYuanDenseV1Config", {}),
    "HunYuanMoEV1": ("HunYuanMoEV1Config", {"num_experts": 4, "moe_topk": 2}),
    "Jais2": ("Jais2Config", {}),
    "Olmo": ("OlmoConfig", {}),
    "Olmo2": ("Olmo2Config", {}),
    "Olmo3": ("Olmo3Config", SLIDING),
    "Phi": ("PhiConfig", {}),
    "SeedOss": ("SeedOssConfig", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "Starcoder2": ("Starcoder2Config", TIED),
}

# Every edge of vLLM's blocks of 128 tokens and of the sliding window of 16, and nothing but one token.
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 200)
TEXT = " ".join(f"{n} times {n} is {n * n}." for n in range(1000))
"""ASCII, for `tokenizer`."""


def write_tiny(family: str, folder: Path, **settings: int) -> None:
    """Write a random float32 checkpoint of `family`, with `settings` of its own; the same one every time."""
    config_class, changes = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SHAPE | changes | settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    # Some families have a class of another name, or none of their own, in transformers.
    written = json.loads((folder / "config.json").read_text()) | {"architectures": [f"{family}ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(written, indent=2))


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    """Random prompts of those lengths, without special tokens."""
    chosen = random.Random(seed)
    return [[chosen.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each ASCII character; with `bos`, one more before every text."""
    plain = Tokenizer(models.WordLevel({"<s>": 1} | {chr(code): code for code in range(3, 128)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>")
