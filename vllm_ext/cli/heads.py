"""`vllm-ext spell`: tokens spelled out, for character heads."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_ext.cli.options import Model, errors
from vllm_ext.errors import UsageError

Text = Annotated[Path | None, typer.Option(help='A .txt, a .jsonl with "text", or a folder of them; by default prose.')]
Written = Annotated[int, typer.Option(min=0, help="Tokens that the model writes itself, beside.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each passage.")]
Positions = Annotated[int, typer.Option(help="How many bytes of a token are spelled.")]

app = typer.Typer(no_args_is_help=True, help="Tokens spelled out, byte by byte, for character heads.")


@app.command("inspect")
def inspect_spellings(model: Model, positions: Positions = 16) -> None:
    """Print how MODEL's tokens are spelled, and which are not to their end."""
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads.inspect import print_inspected

    print_inspected(Checkpoint.open(model, weights=False), positions)


@app.command("train")
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist. FOLDER-training lies beside.")],
    head: Annotated[Literal["char", "stock"], typer.Option(help="stock keeps it, to heal a plan's layers.")] = "char",
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

    In several processes: `accelerate launch -m vllm_ext.cli.main spell train ...`.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads import training
    from vllm_ext.heads.conversion import Settings, convert

    if head == "stock" and not layers:
        raise UsageError("--head stock without --layers: nothing would be trained; give --layers")
    if lora and not layers:
        raise UsageError(f"--lora {lora} without --layers: adapters are of the trained layers; give --layers")
    conversion = Settings(head, positions, width, layers, lora, text, tokens, written, length, held_out)
    trained = training.Settings(
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


@app.command("time")
def time_heads(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint's folder, whose tokenizer and sizes to take.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=2, help="Without MODEL: tokens, spelled at random.")] = 128256,
    hidden_size: Annotated[int, typer.Option(min=32, help="Without MODEL.")] = 2048,
    positions: Annotated[int, typer.Option(min=2, help="How many bytes of a token are spelled.")] = 16,
    width: Annotated[int, typer.Option(min=0, help="Of the gated block before the heads; 0 is none.")] = 1536,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of logits at once; by default 1, 4 and 32.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of weights and states; float32 where bfloat16 is slow.")
    ] = "bfloat16",
) -> None:
    """Time a stock head and those in its place beside each other, with random weights.

    As in vLLM's workers, sums are compiled where torch's OpenMP is preloaded: LD_PRELOAD=.../torch/lib/libgomp.so.1.
    """
    import torch

    from model_executors.heads.head_plan import GROUP
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads.timing import heads_of, measure, print_measured, random_spellings

    if model is None:
        spellings: Any = random_spellings(vocab_size, positions)
    else:
        from vllm_ext.heads.vocabulary import CharacterVocabulary
        from vllm_ext.offline.model import read_tokenizer

        source = Checkpoint.open(model, weights=True)
        vocab_size, hidden_size = source.config["vocab_size"], source.config["hidden_size"]
        spellings = CharacterVocabulary.of(read_tokenizer(source), vocab_size, positions).spellings
    if hidden_size % GROUP:
        raise UsageError(f"--hidden-size {hidden_size}: the screened head needs a multiple of {GROUP}")
    chosen = rows or [1, 4, 32]
    kind = getattr(torch, dtype)
    medians = measure(heads_of(hidden_size, spellings, positions, width, kind), hidden_size, chosen, kind)
    print_measured(medians, chosen, f"heads of {vocab_size:,} tokens, {hidden_size:,} wide, {dtype}")


@app.command("screened")
def screened(
    model: Model, tokens: Annotated[int, typer.Option(min=512, help="Tokens of held-out prose.")] = 16384
) -> None:
    """Measure how often the shortlist of --head screened misses a token that it should hold, for MODEL."""
    from model_executors.heads.head_plan import GROUP
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.heads.screening import measure, print_missed

    source = Checkpoint.open(model, weights=True)
    if (hidden_size := source.config["hidden_size"]) % GROUP:
        raise UsageError(f"model {model}: hidden_size {hidden_size} is no multiple of {GROUP}; choose another")
    print_missed(*measure(source, tokens), source.called)
