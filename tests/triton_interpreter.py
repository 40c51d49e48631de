"""Triton's interpreter in this process: what vLLM wrote in Triton then runs on a CPU, its Model Runner V2 with it.

vLLM for CPUs takes V2 where it finds triton-cpu, which comes with no package that we know of. The interpreter runs the
same kernels with numpy. That proves what they compute, and all of V2 around them; not what a GPU's compiler makes of
them.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def interpret() -> None:
    """Let vLLM find Triton, for CPUs, and take V2. To be called before either is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    let_vllm_find_triton()
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    interpreter._convert_float = _rounded(interpreter._convert_float)
    for name in ("create_masked_load", "create_masked_store"):
        setattr(InterpreterBuilder, name, _with_true_masks(getattr(InterpreterBuilder, name)))


def let_vllm_find_triton() -> None:
    """As vLLM for CPUs does where there is triton-cpu. To be called before vLLM is imported."""
    from triton.backends import backends

    nothing = SimpleNamespace(is_active=lambda: False, supports_target=lambda _: False)
    backends["cpu"] = SimpleNamespace(driver=nothing, compiler=nothing)


def _with_true_masks(access: Callable[..., Any]) -> Callable[..., Any]:
    """With masks of integers, as `&` leaves them in some of vLLM's kernels: compiled, they are as good as any."""
    place = list(inspect.signature(access).parameters).index("mask")

    def masked(*args: Any, **named: Any) -> Any:
        mask = args[place]
        mask.data = mask.data.astype(bool)
        return access(*args, **named)

    return masked


def _rounded(convert: Callable[..., Any]) -> Callable[..., Any]:
    """To FP8 as GPUs round: the interpreter loses what is carried into the exponent."""

    def converted(numbers: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if (given.name, wanted.name) != ("fp32", "fp8e4nv"):
            return convert(numbers, given, wanted, rounding)
        nearest = torch.tensor(numbers.view("float32")).to(torch.float8_e4m3fn)
        return nearest.view(torch.uint8).numpy().reshape(numbers.shape)

    return converted


@contextmanager
def attention_in_triton() -> Iterator[None]:
    """All layers attend by vLLM's Triton kernel, as on a GPU without FlashAttention, and windows as on any GPU."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from model_executors.layers import window, window_triton

    chosen = AttentionBackendEnum.TRITON_ATTN.get_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "get_attn_backend_cls", lambda *_, **__: chosen)
        patch.setattr(window, "window_backend", lambda stock: window_triton.WindowBackend)
        # vLLM's kernel that writes the KV cache asks for it, in either way.
        patch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
        patch.setattr(type(current_platform), "has_device_capability", lambda *_, **__: True)
        yield


@contextmanager
def scheduled_ahead() -> Iterator[None]:
    """A step is scheduled before the last one's tokens are known, as on a GPU; vLLM leaves that out for CPUs."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def leave_on(vllm_config: "VllmConfig") -> None:
        on = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "check_and_update_config", staticmethod(leave_on))
        yield
