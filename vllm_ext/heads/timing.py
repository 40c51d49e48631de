"""`vllm-ext spell time`: heads by themselves, in turn in one process, on random weights and states."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from model_executors.heads.character_head import CharacterHead, rescore, slots_of
from model_executors.heads.exact_rows import exact_scores
from model_executors.heads.head_plan import HeadPlan, HeadShape
from model_executors.heads.screened_head import Int4Copy, rescored
from vllm_ext import openmp
from vllm_ext.progress import progress

Head = Callable[[torch.Tensor], torch.Tensor]
ROUNDS, WARM_UP = 40, 3


def heads_of(
    hidden_size: int,
    spellings: Sequence[Sequence[int]],
    places: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Head]:
    """A stock head, and those in its place, for a vocabulary that is spelled so."""
    found, slots = slots_of(spellings, places)
    weight = torch.randn(len(spellings), hidden_size).to(dtype)
    char = CharacterHead(HeadShape(hidden_size, len(spellings), slots, width), dtype)
    for name, parameter in char.named_parameters():
        parameter.data.copy_(found if name == "spellings" else torch.randn(parameter.shape) / 8)
    char.spell()
    if openmp.preloaded():
        char.spelling.compile_sums()
    copy, shortlist = Int4Copy(weight), HeadPlan.shortlist

    def spelled_and_rescored(states: torch.Tensor) -> torch.Tensor:
        scores = char(states)
        rescore(scores, shortlist, partial(exact_scores, states, weight))
        return scores

    return {
        "stock": lambda states: nn.functional.linear(states, weight),
        "char": char,
        "rescored": spelled_and_rescored,
        "screened": lambda states: rescored(copy(states), states, weight, shortlist),
    }


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
            states = torch.randn(number, hidden_size).to(dtype)
            taken: dict[str, list[float]] = {name: [] for name in heads}
            for _ in range(WARM_UP + ROUNDS):
                for name, head in heads.items():
                    start = time.perf_counter()
                    head(states)
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
