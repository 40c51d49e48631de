"""Heads that stand before or in place of the stock one, inside the engine.

Each is called with the last states and the stock head, which it asks for the rows that it does not answer itself.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig

from model_executors.attention_plan import CONFIG_KEY
from model_executors.heads.character_head import CharacterHead, rescore
from model_executors.heads.exact_rows import ExactRows
from model_executors.heads.head_metrics import HeadMetrics
from model_executors.heads.head_plan import HeadPlan, head_tensor_name

StockHead = Callable[[torch.Tensor], torch.Tensor | None]
"""`[rows, hidden_size]` to `[rows, vocab_size]`; None on a tensor-parallel rank that does not sample."""


class FallbackHead(nn.Module):
    """Character heads (*SpeLLM*, arXiv 2507.16323); rows that they are unsure of fall back to the stock head.

    The stock head's own rows score the best spelled tokens where the plan says so. Every tensor-parallel rank holds all
    of them. With a threshold, a CPU's host reads which rows fall back, and the stock head runs for these alone. On
    other devices the host waits for nothing: both heads run for all rows, and each row takes one of the two.
    """

    def __init__(self, plan: HeadPlan, vllm_config: VllmConfig, exact: ExactRows | None) -> None:
        super().__init__()
        self.exact, self.shortlist = exact, plan.shortlist
        config = vllm_config.model_config
        shape = plan.shape(config.get_hidden_size(), config.get_vocab_size())
        assert isinstance(config.dtype, torch.dtype)
        self.heads = CharacterHead(shape, config.dtype)
        self.threshold = plan.threshold
        self.compiles = compiles_sums(vllm_config)
        self.metrics = HeadMetrics(str(config.served_model_name))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names they have in a checkpoint."""
        return {head_tensor_name(name): parameter for name, parameter in self.heads.named_parameters()}

    def loaded(self) -> None:
        """To be called once the tensors are there."""
        self.heads.prepare()
        if self.compiles:
            self.heads.spelling.compile_sums()

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
        unsure = confidence < (math.log(self.threshold) if self.threshold else -math.inf)
        if self.threshold:
            fallen = fall_back_by_row if hidden_states.device.type == "cpu" else fall_back_by_choice
            answered = fallen(scores, hidden_states, unsure, stock)
            if answered is None:
                return None
            scores = answered
        self.metrics.count_masked(unsure, time.perf_counter() - start)
        self.metrics.observe(confidence)
        return scores


def fall_back_by_row(
    scores: torch.Tensor, hidden_states: torch.Tensor, unsure: torch.Tensor, stock: StockHead
) -> torch.Tensor | None:
    """Put the stock head's logits into `scores` `[rows, vocab_size]` where `unsure` `[rows]`, asking it for these rows
    of `hidden_states` `[rows, hidden_size]` alone; the host reads which.
    """
    rows = unsure.nonzero()[:, 0]
    if len(rows):
        logits = stock(hidden_states[rows])
        if logits is None:
            return None
        scores[rows] = logits.float()
    return scores


def fall_back_by_choice(
    scores: torch.Tensor, hidden_states: torch.Tensor, unsure: torch.Tensor, stock: StockHead
) -> torch.Tensor | None:
    """The same, asking the stock head for all rows, so that nothing is read on the host."""
    logits = stock(hidden_states)
    return None if logits is None else torch.where(unsure[:, None], logits.float(), scores)


def compiles_sums(vllm_config: VllmConfig) -> bool:
    """Whether the sums are compiled.

    On a CPU that is for processes in which no other engine starts later, as vLLM's workers are, and a process that says
    so: `--additional-config '{"vllm_ext": {"compile_sums": true}}'`. N-gram speculation has numba's threads to itself.
    """
    if vllm_config.device_config.device_type != "cpu":
        return not vllm_config.model_config.enforce_eager
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method == "ngram":
        return False
    ours = vllm_config.additional_config.get(CONFIG_KEY, {}) if isinstance(vllm_config.additional_config, dict) else {}
    return bool(ours.get("compile_sums", multiprocessing.parent_process() is not None))


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
