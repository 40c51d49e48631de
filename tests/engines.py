"""vLLM engines inside the test process, with a plan laid over a stock checkpoint or written beside it."""

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import pytest
from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams
from vllm.plugins import load_general_plugins

from model_executors.attention_plan import LayerPlan
from tests.answers import Answer
from vllm_ext.checkpoint import Checkpoint

NEW_TOKENS = 8
SKIP = LayerPlan("skip")
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 2**27,  # clearing a gigabyte takes half of a start
}


def skipping(layers: list[int]) -> dict[int, LayerPlan]:
    """The changes that skip `layers`."""
    return dict.fromkeys(layers, SKIP)


@dataclass
class Kept:
    """The engine that nobody uses just now, and what it was started with."""

    llm: LLM
    started_with: str


_kept: list[Kept] = []  # at most one, as engines in one process share vLLM's distributed state


@contextmanager
def engine(folder: Path, changes: Mapping[int, LayerPlan] | None = None, **settings: Any) -> Iterator[LLM]:
    """An engine with `changes` laid over a stock checkpoint; None serves the checkpoint as it is.

    The last one is kept, and given again to whoever asks for the same: no prefix is cached in it any more.
    """
    if changes is not None:
        checkpoint = Checkpoint.open(str(folder), weights=False)
        overrides = checkpoint.overrides(checkpoint.planned(changes))
        settings["hf_overrides"] = settings.get("hf_overrides", {}) | overrides
    settings = DEFAULTS | settings
    environment = [os.environ.get(name) for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")]
    started_with = json.dumps([str(folder), settings, environment], sort_keys=True, default=repr)
    if _kept and _kept[0].started_with == started_with:
        this = _kept.pop()
    else:
        end_kept()
        config = Checkpoint.open(str(folder), weights=False).config | settings.get("hf_overrides", {})
        _inspect_here(*config["architectures"])
        gc.freeze()  # or the seven collections of a start and an end would each look through all that is imported
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it goes before kv_cache_memory_bytes
            this = Kept(LLM(str(folder), **settings), started_with)
    reusable = False
    try:
        yield this.llm
        reusable = this.llm.reset_prefix_cache()  # not where requests are left
    finally:
        end_kept()  # one that was started beside this one
        _kept.append(this)
        if not reusable:
            end_kept()


def end_kept() -> None:
    """End the engine that is kept, if any."""
    while _kept:
        _kept.pop().llm.llm_engine.engine_core.shutdown()


def outputs(llm: LLM, prompts: list[list[int]], max_tokens: int, prompt_logprobs: bool) -> list[RequestOutput]:
    """vLLM's greedy outputs for all prompts in one batch."""
    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


def answers(
    llm: LLM, prompts: list[list[int]], max_tokens: int = NEW_TOKENS, prompt_logprobs: bool = True
) -> list[Answer]:
    """Greedy answers to all prompts in one batch."""
    return [
        Answer(
            list(output.outputs[0].token_ids),
            _logprobs(output.outputs[0].logprobs, output.outputs[0].token_ids),
            _logprobs(output.prompt_logprobs[1:], prompt[1:]) if prompt_logprobs else [],
        )
        for output, prompt in zip(outputs(llm, prompts, max_tokens, prompt_logprobs), prompts, strict=True)
    ]


def _logprobs(positions: list[dict[int, Any]], tokens: list[int]) -> list[float]:
    return [position[token].logprob for position, token in zip(positions, tokens, strict=True)]


def runner(llm: LLM) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _inspect_here(architecture: str) -> None:
    """Register the class itself: one named by a string would be inspected in a process of its own, for 20 seconds."""
    load_general_plugins()  # vLLM does so once in a process
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
