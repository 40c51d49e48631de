"""Heads that stand before or in place of the stock one, inside the engine.

Each is called with the last states and the stock head, which it asks for the rows that it does not answer itself.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig

from model_executors.heads.character_head import CharacterHead, rescore
from model_executors.heads.exact_rows import ExactRows
from model_executors.heads.head_metrics import HeadMetrics
from model_executors.heads.head_plan import HeadPlan, head_tensor_name

StockHead = Callable[[torch.Tensor], torch.Tensor | None]
"""`[rows, hidden_size]` to `[rows, vocab_size]`; None on a tensor-parallel rank that does not sample."""


class FallbackHead(nn.Module):
    """Character heads (*SpeLLM*, arXiv 2507.16323); rows whose spelling is unsure go to the stock head.

    The stock head's own rows score the best spelled tokens where the plan says so.

    Every tensor-parallel rank holds all of them. Which rows fall back is read on the host where there is a threshold,
    since the stock head runs for these rows only.
    """

    compiles: ClassVar[bool] = multiprocessing.parent_process() is not None
    """Whether no other engine starts in this process later, as in vLLM's workers."""

    def __init__(self, plan: HeadPlan, vllm_config: VllmConfig, exact: ExactRows | None) -> None:
        super().__init__()
        self.exact, self.shortlist = exact, plan.shortlist
        speculation = vllm_config.speculative_config
        self.ngrams = speculation is not None and speculation.method == "ngram"
        config = vllm_config.model_config
        shape = plan.shape(config.get_hidden_size(), config.get_vocab_size())
        assert isinstance(config.dtype, torch.dtype)
        self.heads = CharacterHead(shape, config.dtype)
        self.threshold = plan.threshold
        self.metrics = HeadMetrics(str(config.served_model_name))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names they have in a checkpoint."""
        return {head_tensor_name(name): parameter for name, parameter in self.heads.named_parameters()}

    def loaded(self) -> None:
        """To be called once the tensors are there."""
        self.heads.prepare()
        if self.compiles and not self.ngrams and self.heads.weight.device.type == "cpu":
            self.heads.spelling.compile_sums()  # vLLM's n-gram proposer has numba's threads to itself

    def forward(self, hidden_states: torch.Tensor, stock: StockHead) -> torch.Tensor | None:
        """`[rows, hidden_size]` to log-probabilities, or the stock head's logits, `[rows, vocab_size]`."""
        if self.threshold >= 1:
            with self.metrics.timed(0, len(hidden_states)):
                return stock(hidden_states)
        start = time.perf_counter()
        scores = self.heads(hidden_states)
        if self.exact is None:
            confidence = scores.amax(-1)
        else:
            confidence = rescore(scores, self.shortlist, partial(self.exact, hidden_states))
        unsure = (confidence < math.log(self.threshold)).nonzero()[:, 0] if self.threshold else scores.new_empty(0)
        if len(unsure):
            logits = stock(hidden_states[unsure])
            if logits is None:
                return None
            scores[unsure] = logits.float()
        self.metrics.count(len(hidden_states) - len(unsure), len(unsure), time.perf_counter() - start)
        self.metrics.observe(confidence)
        return scores


def head_of(vllm_config: VllmConfig, model: nn.Module) -> FallbackHead | None:
    """The character heads that the model's configuration asks for; None where the stock head is asked.

    Raises:
        ValueError: where the stock head's rows are needed and cannot be read.

    """
    plan = HeadPlan.from_hf_config(vllm_config.model_config.hf_config)
    if not plan.is_character:
        return None
    stock = (getattr(model, name, None) for name in ("lm_head", "logits_processor"))
    return FallbackHead(plan, vllm_config, ExactRows(*stock) if plan.kind == "rescored" else None)
