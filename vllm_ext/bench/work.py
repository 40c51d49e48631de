"""The work that stock and variant are given: steps of an engine, as prefill, decode, or both in one batch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from vllm_ext.costs import Step
from vllm_ext.errors import UsageError

DECODE_STEPS = 32
"""Steps that a decode is timed over."""
MIXED_STEPS = 8
"""Steps that a prompt among streams may take, chunk by chunk."""
SETTLING_STEPS = 4
"""Steps before any are timed."""


@dataclass(frozen=True)
class Work:
    """What is timed. As a user types it: `prefill:1024`, `decode:8x128` (streams x context), or `mixed:8x128+512`, a
    prompt of 512 tokens in one step with 8 streams.
    """

    kind: Literal["prefill", "decode", "mixed"]
    prompt: int = 0
    streams: int = 0
    context: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one.

        Raises:
            UsageError: for another form, or sizes that cannot be.

        """
        if match := re.fullmatch(r"prefill:(\d+)", text):
            made = cls("prefill", prompt=int(match[1]))
        elif match := re.fullmatch(r"decode:(\d+)x(\d+)", text):
            made = cls("decode", streams=int(match[1]), context=int(match[2]))
        elif match := re.fullmatch(r"mixed:(\d+)x(\d+)\+(\d+)", text):
            made = cls("mixed", prompt=int(match[3]), streams=int(match[1]), context=int(match[2]))
        else:
            raise UsageError(f"--work {text}: write it as prefill:1024, decode:8x128 or mixed:8x128+512")
        if made.kind != "prefill" and min(made.streams, made.context) < 1:
            raise UsageError(f"--work {text}: streams and context are 1 or more")
        if made.kind != "decode" and made.prompt < 1:
            raise UsageError(f"--work {text}: the prompt has 1 token or more")
        return made

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill:{self.prompt}"
        return f"{self.kind}:{self.streams}x{self.context}" + (f"+{self.prompt}" if self.kind == "mixed" else "")

    @property
    def steps(self) -> Sequence[Step]:
        """The step that is timed; of a decode, the one in the middle of those that are."""
        prompt = [Step(self.prompt, 0, prompt=True)] if self.prompt else []
        grown = self.context + (DECODE_STEPS // 2 if self.kind == "decode" else 2)
        return [*prompt, *[Step(1, grown, prompt=False)] * self.streams]

    def samples(self, repeats: int) -> int:
        """How many steps, or whole prompts, are timed."""
        return DECODE_STEPS if self.kind == "decode" else repeats

    def answer_tokens(self, repeats: int) -> int:
        """Tokens that each stream generates. The first ones to be prefilled go on while the others are, and still must
        not end before the last step that is timed.
        """
        return SETTLING_STEPS + self.streams + self.samples(repeats) * (1 if self.kind == "decode" else MIXED_STEPS)

    def longest(self, repeats: int) -> int:
        """Tokens of the longest request."""
        return max(self.prompt + 1, self.context + self.answer_tokens(repeats) if self.streams else 0)

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model, as an estimate of how long it takes."""
        return self.prompt + self.streams * (self.context + DECODE_STEPS)


DEFAULT = ("prefill:256", "prefill:1024", "prefill:4096", "decode:1x128", "decode:8x128", "decode:32x128")
DEFAULT_LONG = ("decode:1x2048", "decode:8x2048", "mixed:8x128+512")
