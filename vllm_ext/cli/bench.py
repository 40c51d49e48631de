"""`vllm-ext bench`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from model_executors.attention_plan import Consolidation
from vllm_ext.cli.options import VLLM_OPTIONS, Agreement, Freeze, Head, Window, end_cleanly
from vllm_ext.errors import UsageError

Interleaved = Annotated[
    bool,
    typer.Option(
        "--interleaved",
        help="Keep the engines of a round up together, and let them take turns step by step, so that the machine's "
        "drift is in all of them. They must fit in memory beside each other.",
    ),
]

app = typer.Typer()


@app.command("bench", context_settings=VLLM_OPTIONS)
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or a hub name; or give --shape.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="A model of random weights in its place: llama-3.2-1b, qwen2.5-0.5b, gemma-3-270m."),
    ] = None,
    planned: Annotated[str | None, typer.Option(help="A planned checkpoint, in place of --skip and --freeze.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="Layers the variant skips; `none` plans nothing, and measures that.")
    ] = None,
    freeze: Freeze = None,
    window: Window = None,
    consolidation: Annotated[
        Consolidation | None, typer.Option(help="With --shape: what skipped layers add in place of attention.")
    ] = None,
    head: Head = None,
    agreement: Agreement = None,
    work: Annotated[
        list[str] | None,
        typer.Option(
            help="What is timed, may be given several times: prefill:1024, decode:8x128 (streams x context), "
            "mixed:8x128+512 (a prompt of 512 among 8 streams). By default prefill at 256, 1,024 and 4,096 tokens, "
            "and decode at 1, 8 and 32 streams with a context of 128."
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Beside the default work, contexts of 2,048 and a mixed batch.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each of the two is started and measured.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="How often a prompt is timed in each process.")] = 3,
    interleaved: Interleaved = False,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
) -> None:
    """Measure stock vLLM and a variant in turn, beside what the arithmetic allows; options of `vllm serve` go to both.

    Every process is fresh and holds one engine. The ideal gain follows from the plan, the model's shape and the work
    by a roofline (see vllm_ext/bench/machine.py); the share is the measured gain by the ideal one. The last line of
    the output is JSON. Prompts are random, or with --agreement prose, of which character heads can be sure. The default
    work takes five minutes for the embedded model and --enforce-eager, and twice that compiled, on an idle machine; on
    a busy one give --interleaved. On a CPU the KV cache has 1 GiB unless VLLM_CPU_KVCACHE_SPACE says otherwise.
    """
    from vllm_ext.bench.command import Pair
    from vllm_ext.bench.command import bench as run
    from vllm_ext.bench.run import BenchSettings
    from vllm_ext.bench.work import DEFAULT, DEFAULT_LONG
    from vllm_ext.layers import layer_plans

    args = context.args
    if shape is not None and model is not None and model.startswith("-"):
        args, model = [model, *args], None  # the first of vLLM's options lands where no MODEL is given
    overlaid = not (skip is freeze is window is None)
    if (planned is not None and overlaid) or (planned is head is None and not overlaid):
        raise UsageError("bench needs either --planned, or some of --skip, --window, --freeze and --head")
    if consolidation is not None and shape is None:
        raise UsageError(
            f"--consolidation {consolidation}: it needs fitted tensors; write them with vllm-ext plan, then --planned"
        )
    if (model is None) == (shape is None):
        raise UsageError("bench needs either a MODEL or a --shape; give one of them")
    for option, one in (("--planned", planned), ("--agreement", agreement)):
        if one is not None and shape is not None:
            raise UsageError(f"{option} {one}: it is for a checkpoint, and a --shape is of random weights; drop it")
    given = {"--planned": planned and Path(planned).name, "--skip": skip, "--freeze": freeze, "--window": window}
    given |= {"--consolidation": consolidation, "--head": head}
    given["--agreement"] = None if agreement is None else f"{agreement:g}"
    described = " ".join(f"{option} {value}" for option, value in given.items() if value is not None)
    changes = layer_plans(skip, window, freeze, consolidation) if overlaid else None
    end_cleanly()
    chosen = tuple(work or ()) or DEFAULT + (DEFAULT_LONG if long else ())
    settings = BenchSettings(chosen, rounds, repeats, seed, interleaved)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-bench-") as scratch:
        if shape is not None:
            pair = Pair.of_shape(shape, Path(scratch), changes, head, described=described)
        else:
            assert model is not None
            pair = Pair.of(model, changes, planned, head, agreement, described=described, vllm_args=args)
        run(pair, settings, args, json_file)
