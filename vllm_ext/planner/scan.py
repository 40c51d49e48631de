"""The scan: what a window on each layer alone costs the answers that lie farther back than it.

A few layers fetch what was told long ago, and the others hardly miss it; which ones, only the model tells. Found so for
two models (`vllm_ext/README.md`); retrieval heads (arXiv 2404.15574) are the same by heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from model_executors.attention_plan import LayerPlan
from vllm_ext.planner.trials import Trials

FETCHES = 0.02
"""Nats a token: a layer without which answers miss more is one that fetches."""


@dataclass(frozen=True)
class Scan:
    """Nats that the answers of each task miss with a window on one layer alone."""

    window: int
    lost: dict[str, dict[int, float]]
    """By task, by layer."""
    heads: dict[int, list[float]] = field(default_factory=dict)
    """Of a layer that fetches, by KV head: what the task misses most that misses that layer most."""

    @property
    def order(self) -> list[int]:
        """The layers, those that are missed least first."""
        return sorted(self.layers, key=lambda layer: (self.most(layer), layer))

    @property
    def layers(self) -> list[int]:
        """Those that were scanned."""
        return sorted(next(iter(self.lost.values())))

    @property
    def fetching(self) -> list[int]:
        """The layers that fetch."""
        return [layer for layer in self.layers if self.most(layer) > FETCHES]

    def most(self, layer: int) -> float:
        """What the task that misses the layer most misses."""
        return max(each[layer] for each in self.lost.values())


def scan(trials: Trials, window: int, layers: Sequence[int], kv_heads: int = 0) -> Scan:
    """A window on each of the layers alone, lowest first, so that only one state of the unchanged model is held; and on
    each of the `kv_heads` of those that fetch.

    Tasks that are no longer than the window have nothing to say, unless there are no others.
    """
    far = [task for task in trials.tasks if task.length is not None] or list(trials.tasks)
    lost = {
        task.name: {layer: trials.lost(task, {layer: LayerPlan("window", window)}) for layer in layers} for task in far
    }
    found = Scan(window, lost)
    for layer in found.fetching:
        task = max(far, key=lambda task: lost[task.name][layer])
        found.heads[layer] = [trials.head_lost(task, layer, window, head) for head in range(kv_heads)]
    return found
