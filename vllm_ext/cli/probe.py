"""`vllm-ext probe`: the papers' experiments, layer by layer."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli.options import Data, Model

app = typer.Typer()


@app.command("probe")
def probe(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for results, pictures and report.html; a run goes on in it.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="capitals, sums, reading, prose, summaries, needle (the default, or none beside --data); needles, "
            "values, words, uuids, variables, shots, facts."
        ),
    ] = None,
    data: Data = None,
    manipulation: Annotated[
        list[str] | None, typer.Option(help="random, shuffle, freeze, skip, drop, window; by default all of them.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of texts to retrieve from; may be given several times; by default 512."),
    ] = None,
    items: Annotated[int, typer.Option(help="Items of each task; of those with long items a fifth as many.")] = 40,
    every: Annotated[int, typer.Option(help="Only every so many layers.")] = 1,
    seed: Annotated[int, typer.Option(help="For which items those are, and what is random.")] = 0,
) -> None:
    """Find which layers read earlier tokens: the experiments of *Attend First, Consolidate Later* on MODEL.

    An interrupted run goes on where it stopped. Capitals, sums and prose of the embedded model take three minutes on
    two cores with --every 3 --items 20.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.probe.run import ProbeSettings
    from vllm_ext.probe.run import probe as run

    given: dict[str, Any] = {
        "tasks": [] if data and not task else task,
        "data": data,
        "manipulations": manipulation,
        "lengths": length,
    }
    chosen = {name: tuple(values) for name, values in given.items() if values is not None}
    settings = ProbeSettings(**chosen, items=items, every=every, seed=seed)
    results = run(Checkpoint.open(model, weights=True), out.expanduser(), settings)
    from vllm_ext.probe.report import write

    print(write(results, out.expanduser(), ["vllm-ext", *sys.argv[1:]]))
