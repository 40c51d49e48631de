"""Heads by themselves, in turn in one process, on random weights: `python -m vllm_ext.heads.timing [MODEL]`."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from model_executors.heads.character_head import CharacterHead, rescore, slots_of
from model_executors.heads.exact_rows import exact_scores
from model_executors.heads.head_plan import GROUP, HeadPlan, HeadShape
from model_executors.heads.screened_head import Int4Copy, screened_scores
from vllm_ext import openmp
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError, run_tool
from vllm_ext.heads.vocabulary import POSITIONS, CharacterVocabulary
from vllm_ext.offline.model import read_tokenizer
from vllm_ext.progress import progress

Head = Callable[[torch.Tensor], torch.Tensor]
ROUNDS, WARM_UP = 40, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def heads_of(
    hidden_size: int,
    spellings: Sequence[Sequence[int]],
    places: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Head]:
    """A stock head, and those in its place, for a vocabulary that is spelled so; on the GPU where there is one."""
    found, slots = slots_of(spellings, places)
    weight = torch.randn(len(spellings), hidden_size).to(DEVICE, dtype)
    character = CharacterHead(HeadShape(hidden_size, len(spellings), slots, width), dtype, DEVICE)
    for name, parameter in character.named_parameters():
        parameter.data.copy_(found if name == "spellings" else torch.randn(parameter.shape) / 8)
    character.prepare()
    if DEVICE == "cuda" or openmp.preloaded():
        character.spelling.compile_sums()
    shortlist = HeadPlan.shortlist

    def spelled_and_rescored(states: torch.Tensor) -> torch.Tensor:
        scores = character(states)
        rescore(scores, shortlist, partial(exact_scores, states, weight))
        return scores

    heads: dict[str, Head] = {
        "stock": lambda states: nn.functional.linear(states, weight),
        "character": character,
        "rescored": spelled_and_rescored,
    }
    if DEVICE == "cpu":
        copy = Int4Copy(weight)
        heads["screened"] = lambda states: screened_scores(copy(states), states, weight, shortlist)
    return heads


def random_spellings(tokens: int, places: int) -> list[tuple[int, ...]]:
    """Different spellings, as long as those of a byte-level vocabulary: 7 symbols in the mean."""
    chosen = random.Random(0)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < tokens:
        length = min(places, max(1, round(chosen.gauss(6, 2.5))))
        spelled = tuple(chosen.randrange(97, 123) for _ in range(length))
        found[(*spelled, 256) if length < places else spelled] = None
    return list(found)


@torch.no_grad()
def measure(
    heads: Mapping[str, Head], hidden_size: int, rows: Sequence[int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, list[float]]:
    """Median milliseconds of each head for each number of rows; heads take turns, so that all see one machine."""
    medians: dict[str, list[float]] = {name: [] for name in heads}
    with progress() as bars:
        for number in bars.track(rows, description="timing"):
            states = torch.randn(number, hidden_size).to(DEVICE, dtype)
            taken: dict[str, list[float]] = {name: [] for name in heads}
            for _ in range(WARM_UP + ROUNDS):
                for name, head in heads.items():
                    start = time.perf_counter()
                    head(states)
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    taken[name].append(1e3 * (time.perf_counter() - start))
            for name, times in taken.items():
                medians[name].append(statistics.median(times[WARM_UP:]))
    return medians


def print_measured(medians: Mapping[str, Sequence[float]], rows: Sequence[int], title: str) -> None:
    """Milliseconds, and the ratio to the stock head."""
    table = Table(title=title)
    for column in ("rows", *medians):
        table.add_column(column, justify="right")
    for at, number in enumerate(rows):
        stock = medians["stock"][at]
        shown = (f"{times[at]:.2f} ms, {times[at] / stock:.2f}x" for times in medians.values())
        table.add_row(str(number), *shown)
    Console().print(table)


def main(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint's folder, whose tokenizer and sizes to take.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=2, help="Without MODEL: tokens, spelled at random.")] = 128256,
    hidden_size: Annotated[int, typer.Option(min=GROUP, help="Without MODEL.")] = 2048,
    positions: Annotated[int, typer.Option(min=2, help="How many bytes of a token are spelled.")] = POSITIONS,
    width: Annotated[int, typer.Option(min=0, help="Of the gated block before the heads; 0 is none.")] = 1536,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of logits at once; by default 1, 4 and 32.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of weights and states; float32 where bfloat16 is slow.")
    ] = "bfloat16",
) -> None:
    """Time a stock head and those in its place beside each other, with random weights.

    As in vLLM's workers, sums are compiled where torch's OpenMP is preloaded: LD_PRELOAD=.../torch/lib/libgomp.so.1.
    """
    spellings: Sequence[Sequence[int]]
    if model is None:
        spellings = random_spellings(vocab_size, positions)
    else:
        source = Checkpoint.open(model, weights=True)
        vocab_size, hidden_size = source.config["vocab_size"], source.config["hidden_size"]
        spellings = CharacterVocabulary.of(read_tokenizer(source), vocab_size, positions).spellings
    if hidden_size % GROUP:
        raise UsageError(f"--hidden-size {hidden_size}: the screened head needs a multiple of {GROUP}")
    chosen = rows or [1, 4, 32]
    kind = getattr(torch, dtype)
    medians = measure(heads_of(hidden_size, spellings, positions, width, kind), hidden_size, chosen, kind)
    print_measured(medians, chosen, f"heads of {vocab_size:,} tokens, {hidden_size:,} wide, {dtype}")


if __name__ == "__main__":
    run_tool(main)
