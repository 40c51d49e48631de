"""vLLM engines inside the test process, with a plan laid over a stock checkpoint."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

from vllm import LLM, RequestOutput, SamplingParams

from tests.answers import Answer
from vllm_ext.checkpoint import Checkpoint

NEW_TOKENS = 8


@contextmanager
def engine(folder: Path, skip: list[int] | None, **settings: Any) -> Iterator[LLM]:
    """An engine that skips `skip`; None is stock vLLM."""
    if skip is not None:
        checkpoint = Checkpoint.open(str(folder), weights=False)
        settings["hf_overrides"] = checkpoint.overrides(checkpoint.planned(skip))
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
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
            [
                position[token].logprob
                for position, token in zip((output.prompt_logprobs or [])[1:], prompt[1:], strict=prompt_logprobs)
            ],
        )
        for output, prompt in zip(outputs(llm, prompts, max_tokens, prompt_logprobs), prompts, strict=True)
    ]


def runner(llm: LLM) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
