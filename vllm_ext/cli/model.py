"""`vllm-ext model`: the embedded default model."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_ext.cli.options import end_cleanly, errors
from vllm_ext.errors import UsageError

app = typer.Typer(
    no_args_is_help=True, help="The embedded default model, SmolLM2-135M-Instruct, and checkpoints out of GGUF files."
)


@app.command("fetch")
def fetch(
    to: Annotated[Path | None, typer.Option(help="The folder to make; by default one in your cache.")] = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="With the plan that `vllm-ext search` found for it.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="With the character heads that `vllm-ext heads train` made for it.")
    ] = False,
) -> None:
    """Turn the packaged model into a checkpoint, once, and print its folder."""
    from vllm_ext.embedded import model as embedded

    if planned and heads:
        raise UsageError("--planned --heads: the heads are for the model without a plan; take one of them")

    end_cleanly()
    get = embedded.fetch_planned if planned else embedded.fetch_heads if heads else embedded.fetch
    with errors.status(f"{embedded.NAME}: out of its package into a checkpoint, about half a minute the first time"):
        folder = get(to)
    print(folder)


@app.command("convert")
def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file of an architecture that transformers converts.")],
    to: Annotated[Path, typer.Option(help="The folder to make; it must not exist.")],
) -> None:
    """Turn a GGUF file into a checkpoint, in bfloat16, that the other commands and vLLM take."""
    from vllm_ext.embedded.model import convert as run

    end_cleanly()
    with errors.status(f"{file.name}: into a checkpoint"):
        folder = run(file.expanduser(), to.expanduser())
    print(folder)
