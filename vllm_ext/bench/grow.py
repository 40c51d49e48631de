"""`vllm-ext bench-grow`: how cost grows with skipped layers, context, streams or vocabulary, as a picture.

Each point of `skipped` is an engine of its own; `context` and `streams` are one pair of engines; `vocabulary` times the
heads by themselves, in this process.
"""

import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from model_executors.attention_plan import LayerPlan
from vllm_ext.bench import machine
from vllm_ext.bench.command import Settings, Variant, pair
from vllm_ext.bench.ideal import Machine, parts, seconds
from vllm_ext.bench.run import rounds
from vllm_ext.bench.work import Work
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError

Dimension = Literal["skipped", "context", "streams", "vocabulary"]
POINTS: dict[Dimension, tuple[int, ...]] = {
    "skipped": (0, 10, 20, 29),
    "context": (128, 512, 1024, 2048, 4096, 8000),
    "streams": (1, 2, 4, 8, 16, 32, 64),
    "vocabulary": (32768, 65536, 131072, 262144),
}
Lines = dict[str, list[float]]
"""Milliseconds at each point, by what is drawn."""


@dataclass(frozen=True)
class Sweep:
    """What a picture shows."""

    dimension: Dimension
    points: tuple[int, ...]
    measured: Lines
    ideal: Lines
    title: str


def sweep(dimension: Dimension, points: Sequence[int], model: str, variant: Variant, args: Sequence[str]) -> Sweep:
    """Measure one dimension; raises UsageError as `bench` does, and for points that cannot be."""
    chosen = tuple(points) or POINTS[dimension]
    if min(chosen) < (0 if dimension == "skipped" else 1):
        raise UsageError(f"--point {min(chosen)}: {dimension} cannot be that few")
    if dimension == "vocabulary":
        return _vocabulary(chosen)
    if dimension == "skipped":
        return _skipped(chosen, model, args)
    work = tuple(f"decode:1x{point}" if dimension == "context" else f"decode:{point}x128" for point in chosen)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-bench-") as scratch:
        two = pair(model, None, variant, Settings(work), args, Path(scratch))
        measured = rounds(two.candidates, work, 1, 1, 0)
    shape = replace(two.shape, element_bytes=measured["stock"][0].element_bytes)
    roof = machine.measured(shape.element_bytes)
    plans = {"stock": type(two.plan).of(len(two.plan.layers)), "variant": two.plan}
    names = {"stock": "stock", "variant": variant.described}
    heads = dict(zip(plans, two.heads, strict=True))

    def ideal(name: str) -> list[float]:
        return [1e3 * seconds(parts(shape, plans[name], heads[name], Work.parse(text).steps), roof) for text in work]

    return Sweep(
        dimension,
        chosen,
        {names[name]: [_milliseconds(some[0].seconds[text]) for text in work] for name, some in measured.items()},
        {names[name]: ideal(name) for name in plans},
        f"{two.name}: time per step of a decode, {'one stream' if dimension == 'context' else 'context of 128'}",
    )


def _milliseconds(taken: Sequence[float]) -> float:
    return 1e3 * statistics.median(taken)


def _skipped(points: tuple[int, ...], model: str, args: Sequence[str]) -> Sweep:
    """The top layers skipped, as many as each point says."""
    work = ("prefill:1024", "decode:1x128")
    count = Checkpoint.open(model, weights=False).num_layers
    if max(points) >= count:
        raise UsageError(f"--point {max(points)}: the model has {count} layers and one must attend; choose fewer")
    measured: Lines = {text: [] for text in work}
    ideal: Lines = {text: [] for text in work}
    roof: Machine | None = None
    with tempfile.TemporaryDirectory(prefix="vllm-ext-bench-") as scratch:
        for point in points:
            changes = {layer: LayerPlan("skip") for layer in range(count - point, count)}
            two = pair(model, None, Variant("", changes), Settings(work), args, Path(scratch))
            (found,) = rounds({f"skip {point}": two.candidates["variant"]}, work, 1, 3, 0)[f"skip {point}"]
            shape = replace(two.shape, element_bytes=found.element_bytes)
            roof = roof or machine.measured(shape.element_bytes)
            for text in work:
                measured[text].append(_milliseconds(found.seconds[text]))
                made = parts(shape, two.plan, two.heads[1], Work.parse(text).steps)
                ideal[text].append(1e3 * seconds(made, roof))
    return Sweep("skipped", points, measured, ideal, f"{two.name}: top layers skipped of {count}")


def _vocabulary(points: tuple[int, ...]) -> Sweep:
    """One row through heads on random weights of hidden size 576; the ideal of the stock head, by its bytes."""
    from vllm_ext.spell.timing import heads_of, measure, random_spellings

    hidden_size, places = 576, 16
    measured: Lines = {}
    for point in points:
        heads = heads_of(hidden_size, random_spellings(point, places), places, 0)
        for name, (taken,) in measure(heads, hidden_size, [1]).items():
            measured.setdefault(name, []).append(taken)
    roof = machine.measured()
    ideal = {"stock": [1e3 * point * hidden_size * 2 / roof.bandwidth for point in points]}
    return Sweep("vocabulary", points, measured, ideal, "Heads by themselves: one row, hidden size 576")


def draw(found: Sweep, out: Path, command: Sequence[str]) -> None:
    """Write the picture: measured lines in full, ideals dashed, and below it the command that drew it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels: Mapping[str, list[str]] = (
        {text: [text] for text in found.measured} if found.dimension == "skipped" else {"": list(found.measured)}
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for number, name in enumerate(names):
            colour = f"C{number}"
            axis.plot(found.points, found.measured[name], "o-", color=colour, label=name)
            if name in found.ideal:
                axis.plot(found.points, found.ideal[name], "--", color=colour, label=f"{name}: roofline")
        if found.dimension != "skipped":
            axis.set_xscale("log", base=2)
        axis.set(xlabel=found.dimension, ylabel="ms", title=title, ylim=(0, None))
        axis.legend()
    figure.suptitle(found.title)
    drawn_by = shlex.join(command)
    figure.text(0.01, 0.01, drawn_by, fontsize=7, family="monospace")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=90, metadata={"Description": drawn_by})
    plt.close(figure)
