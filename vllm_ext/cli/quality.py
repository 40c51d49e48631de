"""`vllm-ext quality`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ext.cli.options import VLLM_OPTIONS, Freeze, Head, Model, Skip, Window, end_cleanly

app = typer.Typer()


@app.command("quality", context_settings=VLLM_OPTIONS)
def quality(
    context: typer.Context,
    model: Model,
    planned: Annotated[list[str] | None, typer.Option(help="A planned checkpoint; may be given several times.")] = None,
    skip: Skip = None,
    window: Window = None,
    freeze: Freeze = None,
    head: Head = None,
    agreement: Annotated[
        list[float] | None,
        typer.Option(help="Of planned checkpoints with character heads: agreements to serve each at, one by one."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the figures there, and beside it what each model made of the work."),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a passage of prose; may be given several times; by default 512 and 2048."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out prose, for each length.")] = 32768,
    items: Annotated[int, typer.Option(help="How many capitals, and how many sums.")] = 100,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="What is retrieved from far back: needle, needles (one of four), values, words, uuids, variables, "
            "shots, facts; may be given several times; by default needle and needles."
        ),
    ] = None,
    task_length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of an item of a --task; may be given several times; by default 512 and 1024."),
    ] = None,
    task_items: Annotated[
        int,
        typer.Option(
            help="Items of each --task at each length. Each model reads items times lengths for every task: by default "
            "61,440 tokens, half as many as all else takes."
        ),
    ] = 20,
    seed: Annotated[int, typer.Option(help="For which passages, items, capitals and sums those are.")] = 0,
) -> None:
    """Measure what plans cost, beside the stock MODEL: retrieval, prose, capitals, sums.

    Options of `vllm serve` go to all models.

    With --json a run that was stopped goes on from the last model that was done, and models done before are not run
    again.
    """
    from vllm_ext.layers import layer_plans
    from vllm_ext.quality.command import candidates
    from vllm_ext.quality.command import quality as run
    from vllm_ext.quality.work import QualitySettings

    chosen: Any = tuple(task or QualitySettings.tasks)
    lengths, far = tuple(length or QualitySettings.lengths), tuple(task_length or QualitySettings.task_lengths)
    settings = QualitySettings(lengths, tokens, items, seed, chosen, far, task_items)
    changes = None if skip is window is freeze is None else layer_plans(skip, window, freeze)
    given = {"skip": skip, "window": window, "freeze": freeze, "head": head}
    overlaid = ", ".join(f"{option} {value}" for option, value in given.items() if value is not None)
    beside = candidates(model, planned or (), changes, head, agreement or (), overlaid=overlaid, vllm_args=context.args)
    end_cleanly()
    run(model, beside, settings, context.args, json_file)
