"""vLLM engines inside the test process, with a plan laid over a stock checkpoint or written beside it."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

from vllm import LLM, ModelRegistry, RequestOutput, SamplingParams
from vllm.plugins import load_general_plugins

from model_executors.attention_plan import LayerPlan
from tests.answers import Answer
from vllm_ext.checkpoint import Checkpoint

NEW_TOKENS = 8
SKIP = LayerPlan("skip")


def skipping(layers: list[int]) -> dict[int, LayerPlan]:
    """The changes that skip `layers`."""
    return dict.fromkeys(layers, SKIP)


@contextmanager
def engine(folder: Path, changes: Mapping[int, LayerPlan] | None = None, **settings: Any) -> Iterator[LLM]:
    """An engine with `changes` laid over a stock checkpoint; None serves the checkpoint as it is."""
    if changes is not None:
        checkpoint = Checkpoint.open(str(folder), weights=False)
        settings["hf_overrides"] = checkpoint.overrides(checkpoint.planned(changes))
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    config = Checkpoint.open(str(folder), weights=False).config | settings.get("hf_overrides", {})
    _inspect_here(*config["architectures"])
    llm = LLM(str(folder), **defaults | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


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
