"""Options that several commands share, where they write what is no result, and how they end when told to."""

import signal
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console

errors = Console(stderr=True, highlight=False, soft_wrap=True)

VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub name where there is a hub.")]
Skip = Annotated[
    str | None, typer.Option(help="Layers to go without attention and KV cache: 25-29, or 3,7,25-29, or none.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="A file with a task of your own: SQuAD, CNN/DailyMail, or JSON lines with prompt and answer."),
]
Window = Annotated[
    str | None,
    typer.Option(
        help="Layers to attend to the first and the last tokens: 0-7,24-29:256, or 15-24:128,25:64+8 with the first 8."
    ),
]
Freeze = Annotated[
    str | None, typer.Option(help="Layers that prompt tokens end below: 20-29, or with a window 20-29:128.")
]
Head = Annotated[
    Literal["stock", "character", "rescored", "screened"] | None,
    typer.Option(
        help="What makes logits: the stock head, the checkpoint's character heads, these with exact scores for their "
        "best 256 tokens, or a screened stock head."
    ),
]
Agreement = Annotated[
    float | None,
    typer.Option(help="With character heads: how often the top token is to be the stock head's, as 0.98."),
]


def end_cleanly() -> None:
    """Let SIGTERM unwind what runs, so that nothing half-written is left and what was started ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
