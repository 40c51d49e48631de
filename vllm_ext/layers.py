"""Layers as a user types them, alone or with a window: `25-29`, `3,7,25-29`, `15-24:128,25-29:64`, `none`."""

import re

from model_executors.attention_plan import Consolidation, LayerPlan
from vllm_ext.errors import UsageError


def layer_plans(
    skip: str | None = None,
    window: str | None = None,
    freeze: str | None = None,
    consolidation: Consolidation | None = None,
    rank: int | None = None,
) -> dict[int, LayerPlan]:
    """The changed layers' plans, from the command's options.

    A frozen layer may have a window, as `--freeze 20-29:128`, or by being in `--window` too.

    Raises:
        UsageError: for malformed layers, a layer in options that exclude each other, or settings of skipped layers
            where none is skipped.

    """
    for option, value in (("--consolidation", consolidation), ("--rank", rank)):
        if skip is None and value is not None:
            raise UsageError(f"{option} {value}: it says what skipped layers add; give --skip too, or drop it")
    skipped = [] if skip is None else parse_layers(skip)
    windows = {} if window is None else parse_windows(window)
    frozen = {} if freeze is None else _parse(freeze)
    for layer in skipped:
        for option, others in (("--window", windows), ("--freeze", frozen)):
            if layer in others:
                raise UsageError(f"layer {layer} is in --skip and in {option}; name it in one of them")
    for layer, frozen_window in frozen.items():
        if frozen_window is not None and layer in windows:
            raise UsageError(
                f"layer {layer} has window {frozen_window} in --freeze and window {windows[layer]} in --window; "
                "give it one of them"
            )
    try:
        plans = dict.fromkeys(skipped, LayerPlan("skip", consolidation=consolidation or "none", rank=rank))
        plans |= {layer: LayerPlan("window", window=size) for layer, size in windows.items()}
        for layer, size in frozen.items():
            plans[layer] = LayerPlan("freeze", window=windows.get(layer) if size is None else size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return plans


def parse_layers(text: str) -> list[int]:
    """The layers that `text` names, in ascending order; `none` names none.

    Raises:
        UsageError: for an empty list, a malformed part, a backward range or a layer named twice.

    """
    layers = _parse(text)
    for layer, window in layers.items():
        if window is not None:
            raise UsageError(f"layers {text!r}: layer {layer} cannot have a window here; leave out :{window}")
    return list(layers)


def parse_windows(text: str) -> dict[int, int]:
    """The window of each layer that `text` names, in ascending order of the layers; `none` names none.

    Raises:
        UsageError: as `parse_layers` does, and for a part without a window.

    """
    windows = {}
    for layer, window in _parse(text).items():
        if window is None:
            raise UsageError(f"layers {text!r}: layer {layer} has no window; write it as {layer}:128")
        windows[layer] = window
    return windows


def _parse(text: str) -> dict[int, int | None]:
    """The layers and the window of each, where it has one; raises as `parse_layers` does."""
    if text.strip() == "none":
        return {}
    layers: dict[int, int | None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?(?::(\d+))?\s*", part)
        if match is None:
            raise UsageError(
                f"layers {text!r}: {part!r} is no layer or range; write them as 25-29 or 3,7,25-29 or none"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f"layers {text!r}: {part.strip()!r} runs backwards; write {last}-{first}")
        for layer in range(first, last + 1):
            if layer in layers:
                raise UsageError(f"layers {text!r}: layer {layer} is named twice; name each layer once")
            layers[layer] = int(match[3]) if match[3] else None
    return dict(sorted(layers.items()))
