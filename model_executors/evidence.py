"""What was seen to answer right on which device; all else is refused there at start.

Nearly all tests run on a CPU. Other devices have other kernels, and CUDA another of vLLM's model runners, so that what
is right on a CPU can be garbage there, without a word. A row is added when `make test-gpu` has passed with it.
"""

import os
from collections.abc import Iterator

from model_executors.attention_plan import KINDS, AttentionPlan
from model_executors.heads.head_plan import HEAD_KINDS, HeadPlan

UNPROVED = "VLLM_EXT_UNPROVED"
"""An environment variable: with 1 what was not seen is let through, for those who want to find out."""

_H200 = (
    "one H200, vLLM 0.32.0, bfloat16, FlashAttention 3, compiled with full graphs, 2026-11-27: SmolLM2-135M-Instruct, "
)
_SKIP = _H200 + "skip 28-29: perplexity 36.72, capitals 0.438, recall in context 0.650; stock 31.31, 0.425, 0.683"

SEEN: dict[str, dict[str, str]] = {
    "cpu": dict.fromkeys((*KINDS, *HEAD_KINDS), "make test"),
    "cuda": {"full": _SKIP, "skip": _SKIP, "stock": _SKIP},
}
"""By device, the kinds of layer and the heads, with the evidence. Frozen layers answered garbage on CUDA. Windows with
their own first tokens were not tried, nor character heads since their sums and fallback were written anew for GPUs."""


def unproved(plan: AttentionPlan, head: HeadPlan, device: str) -> Iterator[str]:
    """What of a model was not seen to answer right on `device`, a line each."""
    seen = SEEN.get(device, {})
    try_it = f"or set {UNPROVED}=1 to find out whether it does"
    for kind in dict.fromkeys(layer.kind for layer in plan.layers):
        if kind not in seen:
            first = next(number for number, layer in enumerate(plan.layers) if layer.kind == kind)
            yield (
                f"layer {first} is {kind}: such layers were never seen to answer right on {device}; take another kind, "
                + try_it
            )
    if head.kind not in seen:
        yield f"--head {head.kind}: it was never seen to answer right on {device}; take another one, {try_it}"


def allowed() -> bool:
    """Whether the user asked for what is unproved."""
    return os.environ.get(UNPROVED, "0") not in ("", "0")
