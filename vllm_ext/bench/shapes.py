"""Models that are timed without their weights: a configuration of that shape, and vLLM's `--load-format dummy`.

Character heads need spellings, which are no dummies: for them a checkpoint of that shape is written, of random weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_executors.attention_plan import ARCHITECTURE_PREFIX, CONFIG_KEY, AttentionPlan, LayerPlan
from vllm_ext.errors import UsageError

COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# After the models' own config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "gemma-3-270m": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
}


def write_shape(name: str, folder: Path, changes: Mapping[int, LayerPlan] | None = None) -> Path:
    """Write the shape's `config.json`, with a plan where there are `changes`; its fitted tensors are dummies too.

    Raises:
        UsageError: for an unknown shape, or a plan that does not fit it.

    """
    if name not in SHAPES:
        raise UsageError(f"--shape {name}: no such shape; use one of {', '.join(SHAPES)}")
    config = COMMON | SHAPES[name]
    if changes is not None:
        try:
            plan = AttentionPlan.of(config["num_hidden_layers"], changes)
        except ValueError as error:
            raise UsageError(f"--shape {name}: {error}") from error
        planned = [ARCHITECTURE_PREFIX + architecture for architecture in config["architectures"]]
        config = config | {"architectures": planned, CONFIG_KEY: plan.to_config()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_shape_with_heads(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of that shape, and one with character heads beside it, both of random weights.

    Raises:
        UsageError: for an unknown shape.

    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from model_executors.heads.character_head import slots_of
    from model_executors.heads.head_plan import HeadPlan, head_tensor_name
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads.conversion import ConversionSettings
    from vllm_ext.heads.timing import random_spellings
    from vllm_ext.planned_checkpoint import Trained, write_planned

    settings = ConversionSettings()
    stock, spelled = write_shape(name, folder / "stock"), folder / "spelled"
    config = AutoConfig.from_pretrained(stock)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(stock)
    spellings, slots = slots_of(random_spellings(config.vocab_size, settings.positions), settings.positions)
    head = HeadPlan("character", slots=slots, width=settings.width)
    tensors = {
        head_tensor_name(each): spellings if each == "spellings" else torch.randn(size).bfloat16() / size[-1] ** 0.5
        for each, size in head.shape(config.hidden_size, config.vocab_size).tensors.items()
    }
    source = Checkpoint.open(str(stock), weights=True)
    write_planned(source, source.planned({}), spelled, None, Trained(head, tensors, {}, {"text": "random"}))
    return stock, spelled
