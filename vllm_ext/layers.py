"""Layers as a user types them, and back: `25-29`, `3,7,25-29`, `0-7,24-29:256`, `15-24:128,25-29:64+8`, `none`.

`:256` gives windows of 256 tokens to the layers before it that have none yet, `+8` a sink of 8 tokens beside them.
"""

import re
from collections.abc import Mapping, Sequence

from model_executors.attention_plan import FULL, SINK, AttentionPlan, Consolidation, LayerPlan
from vllm_ext.errors import UsageError

Window = tuple[int | None, int | None]
"""How many tokens, and how many in the sink; None for what is not said."""
NO_WINDOW: Window = (None, None)


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
                f"layer {layer} has window {frozen_window[0]} in --freeze and window {windows[layer][0]} in --window; "
                "give it one of them"
            )
    try:
        plans = dict.fromkeys(skipped, LayerPlan("skip", consolidation=consolidation or "none", rank=rank))
        plans |= {layer: LayerPlan("window", *size) for layer, size in windows.items()}
        for layer, size in frozen.items():
            plans[layer] = LayerPlan("freeze", *(size or windows.get(layer, NO_WINDOW)))
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
            raise UsageError(f"layers {text!r}: layer {layer} cannot have a window here; leave out :{window[0]}")
    return list(layers)


def parse_windows(text: str) -> dict[int, Window]:
    """The window of each layer that `text` names, in ascending order of the layers; `none` names none.

    Raises:
        UsageError: as `parse_layers` does, and for layers without a window.

    """
    windows = {}
    for layer, window in _parse(text, shared=True).items():
        if window is None:
            raise UsageError(f"layers {text!r}: layer {layer} has no window; write it as {layer}:128")
        windows[layer] = window
    return windows


def format_layers(layers: Sequence[int]) -> str:
    """`3,5-7`; `none` where there are none."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges) or "none"


def format_plan(changes: Mapping[int, LayerPlan]) -> str:
    """A plan in a few words, which with `--` before each are options: `skip 25-29, window 0-7,15-24:128`."""
    groups: dict[LayerPlan, list[int]] = {}
    for layer, plan in changes.items():
        groups.setdefault(plan, []).append(layer)
    options: dict[str, list[str]] = {}
    for plan, layers in sorted(groups.items(), key=lambda group: min(group[1])):
        if plan == FULL:
            continue
        name = plan.kind if plan.consolidation == "none" else f"consolidation {plan.consolidation}, {plan.kind}"
        name = name if plan.rank is None else f"rank {plan.rank}, {name}"
        size = "" if plan.window is None else f":{plan.window}" + (f"+{plan.sink}" if plan.sink != SINK else "")
        # A window's size holds for all ranges before it; of frozen layers, some may have none.
        each = [format_layers(layers)] if plan.kind != "freeze" else format_layers(layers).split(",")
        options.setdefault(name, []).extend(f"{ranges}{size}" for ranges in each)
    return ", ".join(f"{name} {','.join(parts)}" for name, parts in sorted(options.items())) or "stock"


def format_options(changes: Mapping[int, LayerPlan]) -> str:
    """The same as a command's options."""
    words = format_plan(changes)
    return "" if words == "stock" else "--" + words.replace(", ", " --")


def changes_of(plan: AttentionPlan) -> dict[int, LayerPlan]:
    """The layers that do not attend in full."""
    return {layer: each for layer, each in enumerate(plan.layers) if each != FULL}


def _parse(text: str, shared: bool = False) -> dict[int, Window | None]:
    """The layers and the window of each, where it has one; `shared` gives a window to the layers before it too."""
    if text.strip() == "none":
        return {}
    layers: dict[int, Window | None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?(?::(\d+)(?:\+(\d+))?)?\s*", part)
        if match is None:
            raise UsageError(
                f"layers {text!r}: {part!r} is no layer or range; write them as 25-29 or 3,7,25-29 or none"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f"layers {text!r}: {part.strip()!r} runs backwards; write {last}-{first}")
        window = (int(match[3]), int(match[4]) if match[4] else None) if match[3] else None
        for layer in range(first, last + 1):
            if layer in layers:
                raise UsageError(f"layers {text!r}: layer {layer} is named twice; name each layer once")
            layers[layer] = window
        if shared and window is not None:
            layers = {layer: size or window for layer, size in layers.items()}
    return dict(sorted(layers.items()))
