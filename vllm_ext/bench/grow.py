"""How cost grows with skipped layers, context, streams or vocabulary, as a picture: `python -m vllm_ext.bench.grow`.

Each point of `skipped` is an engine of its own; `context` and `streams` are one pair of engines; `vocabulary` times the
heads by themselves, in this process.
"""

import json
import shlex
import signal
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from model_executors.attention_plan import LayerPlan
from vllm_ext.bench import machine
from vllm_ext.bench.command import Pair
from vllm_ext.bench.run import BenchSettings, Round, rounds
from vllm_ext.bench.work import Work
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.costs import parts
from vllm_ext.embedded.model import fetch, fetch_planned
from vllm_ext.errors import UsageError, run_tool

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


def sweep(
    dimension: Dimension,
    points: Sequence[int],
    model: str,
    planned: str | None,
    args: Sequence[str],
    count: int = 1,
    interleaved: bool = False,
    described: str = "planned",
) -> Sweep:
    """Measure one dimension in `count` rounds; raises UsageError as `bench` does, and for points that cannot be."""
    chosen = tuple(dict.fromkeys(points)) or POINTS[dimension]
    if min(chosen) < (0 if dimension == "skipped" else 1):
        raise UsageError(f"--point {min(chosen)}: {dimension} cannot be that few")
    if dimension == "vocabulary":
        return _vocabulary(chosen)
    if dimension == "skipped":
        return _skipped(chosen, model, args, count, interleaved)
    work = tuple(f"decode:1x{point}" if dimension == "context" else f"decode:{point}x128" for point in chosen)
    settings = BenchSettings(work, count, 1, interleaved=interleaved)
    two = Pair.of(model, planned=planned, described=described, vllm_args=args)
    measured = rounds(two.candidates(settings, args), settings)
    shape = replace(two.shape, element_bytes=measured["stock"][0].element_bytes)
    roof = machine.measured(shape.element_bytes)
    served = {"stock": two.stock, "variant": two.variant}
    names = {"stock": "stock", "variant": described}

    def ideal(name: str) -> list[float]:
        one = served[name]
        needed = [parts(shape, one.attention_plan, one.head, Work.parse(text).steps) for text in work]
        return [1e3 * roof.seconds(each) for each in needed]

    return Sweep(
        dimension,
        chosen,
        {names[name]: [_milliseconds(some, text) for text in work] for name, some in measured.items()},
        {names[name]: ideal(name) for name in served},
        f"{two.name}: time per step of a decode, {'one stream' if dimension == 'context' else 'context of 128'}",
    )


def _milliseconds(measured: Sequence[Round], text: str) -> float:
    return 1e3 * statistics.median(statistics.median(each.seconds[text]) for each in measured)


def _skipped(points: tuple[int, ...], model: str, args: Sequence[str], count: int, interleaved: bool) -> Sweep:
    """The top layers skipped, as many as each point says."""
    work = ("prefill:1024", "decode:1x128")
    layers = Checkpoint.open(model, weights=False).num_layers
    if max(points) >= layers:
        raise UsageError(f"--point {max(points)}: the model has {layers} layers and one must attend; choose fewer")
    pairs, settings = {}, BenchSettings(work, count, interleaved=interleaved)
    for point in points:
        changes = {layer: LayerPlan("skip") for layer in range(layers - point, layers)}
        pairs[f"skip {point}"] = Pair.of(model, changes, vllm_args=args)
    variants = {name: two.candidates(settings, args)["variant"] for name, two in pairs.items()}
    measured = rounds(variants, settings)
    (element_bytes,) = {found.element_bytes for some in measured.values() for found in some}
    roof = machine.measured(element_bytes)
    one = next(iter(pairs.values()))
    shape = replace(one.shape, element_bytes=element_bytes)

    def ideal(two: Pair, text: str) -> float:
        variant = two.variant
        return 1e3 * roof.seconds(parts(shape, variant.attention_plan, variant.head, Work.parse(text).steps))

    return Sweep(
        "skipped",
        points,
        {text: [_milliseconds(some, text) for some in measured.values()] for text in work},
        {text: [ideal(each, text) for each in pairs.values()] for text in work},
        f"{one.name}: top layers skipped of {layers}",
    )


def _vocabulary(points: tuple[int, ...]) -> Sweep:
    """One row through heads on random weights of hidden size 576; the ideal of the stock head, by its bytes."""
    from vllm_ext.heads.timing import heads_of, measure, random_spellings

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
    below = textwrap.fill(drawn_by, 85 * len(panels), break_on_hyphens=False)
    figure.text(0.01, 0.01, below, fontsize=7, family="monospace")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, dpi=90, metadata={"Description": drawn_by})
    plt.close(figure)


def main(
    context: typer.Context,
    dimension: Annotated[Dimension, typer.Argument(help="What grows.")],
    out: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder; by default the embedded model.")] = None,
    planned: Annotated[
        str | None, typer.Option(help="For context and streams: the planned checkpoint; by default the embedded one.")
    ] = None,
    point: Annotated[
        list[int] | None, typer.Option(help="A point to measure, may be given several times; by default a few.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is started; the median is drawn.")] = 1,
    interleaved: Annotated[bool, typer.Option("--interleaved", help="Engines take turns step by step.")] = False,
) -> None:
    """Draw how cost grows with skipped layers, context, streams or vocabulary, beside the roofline's ideal.

    In one round single points are noisy. `vocabulary` times heads and no engine, so rounds mean nothing to it. The last
    line of the output is JSON. Options of `vllm serve` go to all engines.
    """
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UsageError(f"--out {out}: give a .png in a folder that exists")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    used = planned or (str(fetch_planned()) if model is None else None)
    if used is None and dimension in ("context", "streams"):
        raise UsageError("--planned is missing: give a planned checkpoint of that model to measure beside it")
    described = Path(used).name if planned and used else "planned"
    chosen = model or str(fetch())
    found = sweep(dimension, tuple(point or ()), chosen, used, context.args, rounds, interleaved, described)
    draw(found, out, ["python", "-m", "vllm_ext.bench.grow", *sys.argv[1:]])
    print(out)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    run_tool(main, allow_extra_args=True, ignore_unknown_options=True)
