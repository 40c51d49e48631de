"""`vllm-ext heads`: character heads, trained and calibrated."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_ext.cli.options import Model, errors
from vllm_ext.errors import UsageError

Text = Annotated[Path | None, typer.Option(help='A .txt, a .jsonl with "text", or a folder of them; by default prose.')]
Written = Annotated[int, typer.Option(min=0, help="Tokens that the model writes itself, beside.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each passage.")]
Positions = Annotated[int, typer.Option(help="How many bytes of a token are spelled.")]

app = typer.Typer(no_args_is_help=True, help="Character heads, which spell tokens byte by byte.")


@app.command("train")
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist. FOLDER-training lies beside.")],
    head: Annotated[
        Literal["character", "stock"], typer.Option(help="stock keeps it, to heal a plan's layers.")
    ] = "character",
    planned: Annotated[
        Path | None, typer.Option(help="A planned checkpoint of MODEL, whose plan to train for.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="How many of the top layers' MLPs are trained too.")] = 0,
    lora: Annotated[int, typer.Option(min=0, help="Train adapters of this rank there in place of the weights.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Of the gated block before the heads; 0 is none.")] = 1536,
    positions: Positions = 16,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of it.")] = 262144,
    written: Written = 0,
    length: Length = 512,
    held_out: Annotated[int, typer.Option(min=2, help="Tokens to choose thresholds on.")] = 32768,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 2000,
    batch: Annotated[int, typer.Option(help="Tokens of a step, over all processes.")] = 512,
    accumulation: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises, and falls as a cosine does.")] = 2e-3,
    noise: Annotated[float, typer.Option(min=0, help="Added to states, as a part of their spread.")] = 0.0,
    temperature: Annotated[
        float, typer.Option(help="Of the teacher: below 1 its best tokens count more, and are agreed on more often.")
    ] = 1.0,
    loss: Annotated[
        Literal["vocabulary", "places"], typer.Option(help="places is each head's cross-entropy by itself.")
    ] = "vocabulary",
    precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "no",
    save_every: Annotated[int, typer.Option(help="Steps after which all is saved, to go on from.")] = 200,
    seed: Annotated[int, typer.Option(help="For passages, their order, and what is random.")] = 0,
) -> None:
    """Convert MODEL by self-distillation: it is its own teacher. An interrupted run goes on where it stopped.

    In several processes: `accelerate launch -m vllm_ext.cli.main heads train ...`.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads import training
    from vllm_ext.heads.conversion import ConversionSettings, convert

    if head == "stock" and not layers:
        raise UsageError("--head stock without --layers: nothing would be trained; give --layers")
    if lora and not layers:
        raise UsageError(f"--lora {lora} without --layers: adapters are of the trained layers; give --layers")
    conversion = ConversionSettings(head, positions, width, layers, lora, text, tokens, written, length, held_out)
    trained = training.TrainingSettings(
        steps, batch, learning_rate, noise, temperature, loss, precision, accumulation, seed, save_every
    )
    plan = Checkpoint.open(str(planned), weights=True) if planned is not None else None
    source, command = Checkpoint.open(model, weights=True), ["vllm-ext", *sys.argv[1:]]
    report = convert(source, plan, conversion, trained, out.expanduser(), command)
    if report is not None:
        errors.print(f"report: {report}")
        print(out)


@app.command("calibrate")
def calibrate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, with character heads; it is changed.")],
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of it.")] = 32768,
    written: Written = 0,
    length: Length = 512,
    seed: Annotated[int, typer.Option(help="For which passages those are.")] = 0,
) -> None:
    """Find MODEL's thresholds for --agreement anew, on text like your traffic, and keep them in it.

    By default on the part of the prose that is held out from training.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads.calibration import print_calibrated
    from vllm_ext.heads.recalibration import recalibrate

    source = Checkpoint.open(model, weights=True)
    print_calibrated(recalibrate(source, text and text.expanduser(), tokens, written, length, seed), source.called)
