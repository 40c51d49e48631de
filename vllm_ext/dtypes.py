"""Which type a model runs fast in on this machine."""

from typing import Literal

import torch


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no fast products in that type, and float32 is several times faster."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16


def fast_dtype() -> Literal["float32", "auto"]:
    """What vLLM is to be run in where any type will do: the checkpoint's, unless this CPU is slow with it."""
    return "float32" if not torch.cuda.is_available() and slow_on_cpu(torch.bfloat16) else "auto"
