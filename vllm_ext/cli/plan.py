"""`vllm-ext plan`, `search` and `choose`: plans that are named, searched for, and chosen."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from model_executors.attention_plan import Consolidation
from vllm_ext.cli.options import Data, Freeze, Model, Skip, Window, end_cleanly, errors
from vllm_ext.errors import UsageError
from vllm_ext.versions import vllm_problem

app = typer.Typer()

Out = Annotated[Path, typer.Option(help="The folder to write; it must not exist.")]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        help="The part of the mean task score to lose at most; no task may surely lose twice as much, at any length. "
        "0.02 where --kv-saving says nothing."
    ),
]
KvSaving = Annotated[float | None, typer.Option(help="The part of the KV-cache bytes to save at least.")]


@app.command("plan")
def plan(
    model: Model,
    out: Out,
    skip: Skip = None,
    window: Window = None,
    freeze: Freeze = None,
    consolidation: Annotated[
        Consolidation | None, typer.Option(help="What skipped layers add in place of attention; by default none.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of linear maps; by default full.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help='Text to fit on: a .txt, a .jsonl with "text", or a folder of them; by default prose.'),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of it to fit on.")] = 32768,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each passage.")] = 1024,
    seed: Annotated[int, typer.Option(help="For which passages those are.")] = 0,
) -> None:
    """Write a checkpoint with the plan that is named, which vLLM serves with nothing else said.

    Consolidation is fitted to the model on text first, which takes minutes for a small one.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.folders import check_out
    from vllm_ext.layers import layer_plans
    from vllm_ext.planner.writing import Calibration, write_plan

    if skip is window is freeze is None:
        raise UsageError("plan needs --skip, --window or --freeze; say which layers to change, or find them by search")
    out = out.expanduser()
    check_out(out)
    calibration = Calibration(text, tokens, length, seed)
    checkpoint = Checkpoint.open(model, weights=True)
    planned = checkpoint.planned(layer_plans(skip, window, freeze, consolidation, rank))
    _warn_of_vllm()
    end_cleanly()
    write_plan(checkpoint, planned, out, calibration)
    print(out)


@app.command("search")
def search(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for trials, pictures and report.html; a run goes on in it.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="capitals, sums, reading, prose; needle, needles, values, words, uuids, variables, shots, facts; by "
            "default all, or none beside --data."
        ),
    ] = None,
    data: Data = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of texts to retrieve from; may be given several times; by default 512, 1024, 2048."),
    ] = None,
    window: Annotated[
        list[int] | None,
        typer.Option(
            help="Sizes of windows to try, two or three of them; by default 256 and 1024. Those that no item is twice "
            "as long as are left out, as is 1024 with --quick."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="The tokens of requests to save for.")] = 4096,
    items: Annotated[float, typer.Option(help="How many items, as a part of the usual number.")] = 1.0,
    windows_only: Annotated[bool, typer.Option("--windows-only", help="Freeze and skip no layers.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The scan alone, and one plan from it.")] = False,
    seed: Annotated[int, typer.Option(help="For which items those are.")] = 0,
) -> None:
    """Find plans that forget nothing: which layers fetch, and how many of the others can have windows.

    A search that was stopped goes on where it was. `choose` takes a plan from what it found.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.planner.report import write
    from vllm_ext.planner.run import Planner
    from vllm_ext.planner.settings import SearchSettings

    given = {"tasks": () if data and not task else task, "data": data, "lengths": length, "windows": window}
    chosen: dict[str, Any] = {name: tuple(values) for name, values in given.items() if values is not None}
    settings = SearchSettings(**chosen, context=context, items=items, windows_only=windows_only, quick=quick, seed=seed)
    out = out.expanduser()
    end_cleanly()
    front = Planner(Checkpoint.open(model, weights=True), settings, out).find()
    print(write(front, out, ["vllm-ext", *sys.argv[1:]]))


@app.command("choose")
def choose(
    model: Model,
    front: Annotated[Path, typer.Argument(help="The front.json of a search of MODEL.")],
    out: Out,
    max_loss: MaxLoss = None,
    kv_saving: KvSaving = None,
) -> None:
    """Write a checkpoint with the plan of a search that saves most and loses no more than it may."""
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.folders import check_out
    from vllm_ext.layers import format_options
    from vllm_ext.planner.judge import Goal
    from vllm_ext.planner.writing import choose as run

    goal = Goal(0.02 if max_loss is kv_saving is None else max_loss, kv_saving)
    out = out.expanduser()
    check_out(out)
    _warn_of_vllm()
    end_cleanly()
    taken = run(Checkpoint.open(model, weights=True), front, goal, out)
    saved, kept = 100 * taken.kv_saved, 100 * taken.kept
    errors.print(f"{format_options(taken.changes)}: {saved:.0f}% of the KV cache saved, {kept:.1f}% of the score kept")
    print(out)


def _warn_of_vllm() -> None:
    """A plan is written without vLLM, and served by one version of it."""
    if problem := vllm_problem():
        errors.print(f"warning: the plan cannot be served here: {problem}", markup=False, style="yellow")
