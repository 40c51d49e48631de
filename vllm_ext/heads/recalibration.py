"""`vllm-ext heads calibrate`: thresholds for text of one's own, of character heads that are trained already."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model_executors.attention_plan import CONFIG_KEY
from model_executors.heads.head_plan import head_tensor_name
from vllm_ext.checkpoint import CONFIG, Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.heads import calibration
from vllm_ext.heads.conversion import judge
from vllm_ext.heads.states import StudentLayers, collect
from vllm_ext.heads.student import Student, new_head
from vllm_ext.heads.writing import write
from vllm_ext.offline.model import OfflineModel, read_tokenizer
from vllm_ext.planned_checkpoint import FITTED
from vllm_ext.tasks import texts
from vllm_ext.tasks.passages import cut, read_texts


def recalibrate(source: Checkpoint, text: Path | None, tokens: int, written: int, length: int, seed: int) -> Any:
    """Judge the heads, and write what was found into the checkpoint's `config.json`; returns that part of it.

    Raises:
        UsageError: for a checkpoint without heads, or one whose layers were trained with them: its teacher is gone.

    """
    if not source.head.is_character or source.folder is None:
        raise UsageError(f"model {source.name}: it has no character heads; train them with vllm-ext heads train")
    section = source.config[CONFIG_KEY]
    if section["training"].get("settings", {}).get("layers"):
        raise UsageError(f"model {source.name}: its layers were trained with the heads, so its teacher is not in it")
    tokenizer = read_tokenizer(source)
    articles = texts.prose("held_out") if text is None else read_texts(text)
    passages = cut(tokenizer, articles, tokens=tokens, length=length, seed=seed)
    if written:
        overrides = {CONFIG_KEY: {**section, "head": "stock"}}
        own = write(str(source.folder), tokenizer, max(1, written // length), length, seed, overrides)
        passages = torch.cat([passages, own])
    model = OfflineModel(source)
    fitted = load_file(source.folder / FITTED)
    shape = source.head.shape(source.config["hidden_size"], source.config["vocab_size"])
    head = new_head(shape, fitted[head_tensor_name("spellings")], model.device)
    for name, parameter in head.named_parameters():
        parameter.data.copy_(fitted[head_tensor_name(name)])
    with tempfile.TemporaryDirectory() as folder:
        judged = judge(
            Student(model, StudentLayers(), head), collect(model, passages, Path(folder), StudentLayers()), passages
        )
    found = calibration.calibrated(judged)
    name = texts.prose_source() if text is None else text.name
    section["training"] |= {**found, "calibrated_on": {"text": name, "tokens": passages.numel(), "written": written}}
    building = source.folder / f".{CONFIG}"
    building.write_text(json.dumps(source.config, indent=2) + "\n")
    building.replace(source.folder / CONFIG)
    return found
