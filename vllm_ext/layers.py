"""Layer lists as a user types them: `25-29`, `3,7,25-29`, `none`."""

import re

from vllm_ext.errors import UsageError


def parse_layers(text: str) -> list[int]:
    """The layers that `text` names, in ascending order; `none` names none.

    Raises:
        UsageError: for an empty list, a malformed part, a backward range or a layer named twice.

    """
    if text.strip() == "none":
        return []
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(
                f"layers {text!r}: {part!r} is no layer or range; write them as 25-29 or 3,7,25-29 or none"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f"layers {text!r}: {part.strip()!r} runs backwards; write {last}-{first}")
        layers += range(first, last + 1)
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise UsageError(f"layers {text!r}: layer {repeated[0]} is named twice; name each layer once")
    return sorted(layers)
