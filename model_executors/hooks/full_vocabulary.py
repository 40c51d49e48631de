"""Which requests of a batch need every token's logit, so that a head that scores only the best of them is not asked.

A logits processor of Model Runner V1, which is the one that serves on CPUs, as the screened head is for CPUs alone.
"""

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from model_executors.heads.head_plan import HeadPlan

LISTED_PER_K = 4
"""Tokens on a shortlist for each of `top_k`: with so many, the exact top k of a row is nearly always on it."""
PLACE = "vllm_ext.full_vocabulary_rows"
"""Its name among what vLLM finds by name in an engine's steps, where the head looks for it."""


def needs_full_vocabulary(sampling: SamplingParams, shortlist: int) -> bool:
    """Whether a request's next token, or what is reported of it, depends on tokens beyond a shortlist."""
    if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
        return True
    penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    chosen = sampling.logit_bias or sampling.allowed_token_ids or sampling.bad_words or sampling.structured_outputs
    if penalised or chosen or sampling.min_tokens:
        return True
    return sampling.temperature > 0 and not 0 < sampling.top_k * LISTED_PER_K <= shortlist


class FullVocabularyRows(LogitsProcessor):
    """Watches the batch as vLLM tells its logits processors of it, and leaves logits as they are."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.shortlist = HeadPlan.from_hf_config(vllm_config.model_config.hf_config).shortlist
        self.rows: set[int] = set()
        vllm_config.compilation_config.static_forward_context[PLACE] = self

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Requests were removed, added or moved, in that order."""
        if batch_update is None:
            return
        rows = self.rows
        rows.difference_update(batch_update.removed)
        for row, sampling, *_ in batch_update.added:
            (rows.add if needs_full_vocabulary(sampling, self.shortlist) else rows.discard)(row)
        for source, target, direction in batch_update.moved:
            had = source in rows, target in rows
            (rows.add if had[0] else rows.discard)(target)
            stays = direction == MoveDirectionality.SWAP and had[1]
            (rows.add if stays else rows.discard)(source)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab_size]`, unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """So that greedy requests do not even call `apply`."""
        return True
