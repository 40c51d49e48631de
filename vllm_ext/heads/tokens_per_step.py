"""`vllm-ext spell words`: how many tokens a step yields where heads spell words of several tokens too."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.heads.words import speculation
from vllm_ext.offline.model import fast_dtype
from vllm_ext.served import Served

LENGTH = 64
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Steps:
    """What an engine answered, and how."""

    answers: list[list[int]]
    seconds: float
    offered: int = 0
    """Tokens offered as drafts."""
    accepted: int = 0

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))

    @property
    def tokens_per_step(self) -> float:
        """A request's step yields one token, and the drafts of it that are accepted."""
        return self.tokens / (self.tokens - self.accepted)


def prompts_of(texts: Sequence[str], tokenizer: Any, number: int) -> list[list[int]]:
    """The beginnings of as many stretches of the texts, evenly apart.

    Raises:
        UsageError: for too little text.

    """
    tokens = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False).input_ids
    if len(tokens) < number * LENGTH:
        raise UsageError(
            f"--text: it has {len(tokens)} tokens; give {number * LENGTH} or more, or ask for fewer prompts"
        )
    apart = len(tokens) // number
    return [tokens[apart * each : apart * each + LENGTH] for each in range(number)]


def run(model: str, overrides: dict[str, Any], prompts: Sequence[Sequence[int]], tokens: int, drafts: int) -> Steps:
    """Greedy answers of `tokens` tokens to all prompts in one batch; `drafts` 0 goes without words."""
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        model,
        hf_overrides=overrides,
        speculative_config=speculation(drafts) if drafts else None,
        dtype=fast_dtype(),
        max_model_len=2 * LENGTH + tokens,
        enforce_eager=True,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    given = engine.generate([TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts], sampling)
    seconds = time.perf_counter() - start
    counts = {
        metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics() if "spec_decode" in metric.name
    }
    engine.llm_engine.engine_core.shutdown()
    answers = [list(each.outputs[0].token_ids) for each in given]
    offered, accepted = (counts.get(f"vllm:spec_decode_num_{name}_tokens", 0) for name in ("draft", "accepted"))
    return Steps(answers, seconds, int(offered), int(accepted))


def overrides_of(checkpoint: Checkpoint, agreement: float | None) -> dict[str, Any]:
    """Of its configuration, to serve its character heads with the threshold for `agreement`."""
    return Served.open(checkpoint.name, None, "char", agreement).hf_overrides()


def print_measured(stock: Steps, words: Steps, found: int, name: str) -> None:
    """Side by side."""
    table = Table(title=f"{name}: {len(words.answers)} greedy answers, {words.tokens:,} tokens")
    table.add_column()
    for column in ("without words", f"with {found:,} strings"):
        table.add_column(column, justify="right")
    table.add_row("tokens a step", f"{stock.tokens_per_step:.3f}", f"{words.tokens_per_step:.3f}")
    table.add_row("tokens offered", "", f"{words.offered:,}")
    table.add_row("accepted", "", f"{words.accepted:,}")
    table.add_row("seconds", f"{stock.seconds:.1f}", f"{words.seconds:.1f}")
    same = sum(one == other for one, other in zip(stock.answers, words.answers, strict=True))
    table.add_row("answers that are the same", "", f"{same} of {len(words.answers)}")
    Console().print(table)
