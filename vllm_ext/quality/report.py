"""All figures of a model, beside the stock model's, and the table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_ext.quality.work import SHOTS, Replies, Work
from vllm_ext.reports.figures import Figure, Scored, accuracy, agreement, perplexity
from vllm_ext.tasks.items import Task

STOCK = "stock"


@dataclass(frozen=True)
class Figures:
    """All figures of one model; those of passages by their length."""

    retrieved: dict[str, Figure]
    """How much is right of what lies far back in the prompt, by task and length."""
    perplexity: dict[int, Figure]
    """Of passages as prompts. Empty for a model with frozen layers, whose prompt tokens get no logits."""
    agreement: dict[int, Figure]
    """How often the top token is the stock model's, in the same places."""
    answer_perplexity: dict[int, Figure]
    """Of the ends of passages, scored as if they were generated."""
    answer_agreement: dict[int, Figure]
    capitals: Figure
    """How many are right."""
    sums: Figure


def figures_of(
    ours: Replies,
    stock: Replies,
    scores: dict[str, list[float]],
    stock_scores: dict[str, list[float]],
    tasks: Sequence[Task],
    seed: int,
    is_stock: bool,
) -> Figures:
    """One model's figures, beside those of the stock model unless it is that; `tasks` are those that retrieve."""

    def perplexities(scored: dict[int, list[Scored]], theirs: dict[int, list[Scored]]) -> dict[int, Figure]:
        return {
            length: perplexity(passages, None if is_stock else theirs[length], seed)
            for length, passages in scored.items()
        }

    def agreements(scored: dict[int, list[Scored]], theirs: dict[int, list[Scored]]) -> dict[int, Figure]:
        return {} if is_stock else {n: agreement(passages, theirs[n], seed) for n, passages in scored.items()}

    return Figures(
        retrieved={
            task.name: accuracy(scores[task.name], None if is_stock else stock_scores[task.name], seed, task.texts)
            for task in tasks
        },
        perplexity=perplexities(ours.prompts, stock.prompts),
        agreement=agreements(ours.prompts, stock.prompts),
        answer_perplexity=perplexities(ours.answers, stock.answers),
        answer_agreement=agreements(ours.answers, stock.answers),
        capitals=accuracy(scores["capitals"], None if is_stock else stock_scores["capitals"], seed),
        sums=accuracy(scores["sums"], None if is_stock else stock_scores["sums"], seed),
    )


def show(report: Mapping[str, Any], figures: Mapping[str, Figures]) -> None:
    """Print the table: a block a figure and a line a model, so that it fits 80 columns however many there are."""
    settings = report["settings"]
    table = Table(title=f"{report['model']}, beside stock", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in ("items", "value", "× stock's", "95%"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = {name: _rows(each, settings["lengths"]) for name, each in figures.items()}
    for title in rows[STOCK]:
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for name in figures:
            if (figure := rows[name][title]) is not None:
                table.add_row(Text(f"  {name}"), *_cells(figure))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{report['vllm']}; {report['machine']}; seed {settings['seed']}; {report['prose']}; intervals are over the "
        "items, of the ratio where there is one",
        markup=False,
    )


def _rows(figures: Figures, lengths: Sequence[int]) -> dict[str, Figure | None]:
    """The table's rows, by their titles."""
    rows: dict[str, Figure | None] = {f"retrieved, {task} tokens": figure for task, figure in figures.retrieved.items()}
    for length in lengths:
        tokens = Work.answer_tokens(length)
        answers = f"{tokens} tokens after {length - tokens}"
        rows[f"perplexity, prompts of {length}"] = figures.perplexity.get(length)
        rows[f"top token as stock's, prompts of {length}"] = figures.agreement.get(length)
        rows[f"perplexity, {answers}"] = figures.answer_perplexity.get(length)
        rows[f"top token as stock's, {answers}"] = figures.answer_agreement.get(length)
    return rows | {f"capitals, {SHOTS} examples": figures.capitals, f"two-digit sums, {SHOTS} examples": figures.sums}


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    """As `24`, `18.92`, `1.062` and `1.055-1.070`."""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.3f}"
    interval = "" if figure.interval is None else f"{figure.interval[0]:.3f}-{figure.interval[1]:.3f}"
    return str(figure.items), f"{figure.value:.{3 if figure.value < 1 else 2}f}", ratio, interval
