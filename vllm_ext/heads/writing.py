"""Passages that a model writes itself, to be trained on what it will be asked to spell."""

from typing import Any

import torch

from vllm_ext.dtypes import fast_dtype

STAND_IN = "\x00"


def write(
    model: str, tokenizer: Any, passages: int, length: int, seed: int, overrides: dict[str, Any] | None = None
) -> torch.Tensor:
    """`[passages, length]` token ids, sampled by vLLM at temperature 1, `overrides` being of the configuration.

    A model with a chat template first writes what a user could ask, as in *Magpie* (arXiv 2406.08464), then its answer.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    start = opening(tokenizer)
    settings: dict[str, Any] = {"dtype": fast_dtype(), "max_model_len": length, "seed": seed}
    engine = LLM(model, hf_overrides=overrides or {}, disable_log_stats=True, enforce_eager=True, **settings)
    # No seed for each request: on a CPU vLLM 0.32 fails over one.
    sampling = SamplingParams(max_tokens=length - len(start), ignore_eos=True, detokenize=False)
    written = engine.generate([TokensPrompt(prompt_token_ids=start)] * passages, sampling)
    engine.llm_engine.engine_core.shutdown()  # it would hold its memory to the end of the process
    return torch.tensor([[*start, *each.outputs[0].token_ids] for each in written])


def opening(tokenizer: Any) -> list[int]:
    """What comes before a user's first word, or the token that begins a text."""
    if tokenizer.chat_template is None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first]
    text = tokenizer.apply_chat_template([{"role": "user", "content": STAND_IN}], tokenize=False)
    return tokenizer(text.split(STAND_IN)[0], add_special_tokens=False).input_ids
