"""Tiny checkpoints made from another: quantized, with a LoRA adapter, with an adapter merged in."""

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file

GROUP = 32
RANK = 4
WEIGHTS = "model.safetensors"


def write_quantized(stock: Path, quantized: Path, plain: Path) -> None:
    """Write `stock` with linear weights in INT4 by groups of 32 (W4A16), and the same weights written out plainly."""
    for out in (quantized, plain):
        shutil.copytree(stock, out)
    packed, written_out = {}, {}
    for name, weight in load_file(stock / WEIGHTS).items():
        if not name.endswith("proj.weight"):
            packed[name] = written_out[name] = weight
            continue
        groups = weight.view(weight.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
        whole = (groups / scale[..., None].float()).round().clamp(-8, 7)
        written_out[name] = (whole * scale[..., None].float()).view_as(weight)
        stem = name.removesuffix("weight")
        packed[f"{stem}weight_packed"] = pack_to_int32(whole.view_as(weight).to(torch.int8), 4)
        packed[f"{stem}weight_scale"] = scale
        packed[f"{stem}weight_shape"] = torch.tensor(weight.shape)
    save_file(packed, quantized / WEIGHTS)
    save_file(written_out, plain / WEIGHTS)
    config = json.loads((quantized / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (quantized / "config.json").write_text(json.dumps(config))


def write_adapter(stock: Path, adapter: Path, layers: list[int], merged: Path | None = None) -> None:
    """Write a random LoRA adapter on q_proj and down_proj of `layers`, and `stock` with it merged in."""
    weights = load_file(stock / WEIGHTS)
    chosen = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in layers:
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            out_size, in_size = weights[f"{name}.weight"].shape
            down = torch.randn(RANK, in_size, generator=chosen) * 0.1
            up = torch.randn(out_size, RANK, generator=chosen) * 0.3
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
            weights[f"{name}.weight"] += up @ down
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    if merged is not None:
        shutil.copytree(stock, merged)
        save_file(weights, merged / WEIGHTS)
