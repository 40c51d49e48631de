"""How often a screened head's shortlist misses what it should hold, on held-out text:
`python -m vllm_ext.heads.screening MODEL`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from model_executors.heads.head_plan import GROUP, HeadPlan
from model_executors.heads.screened_head import Int4Copy, screened_scores
from model_executors.hooks.full_vocabulary import LISTED_PER_K
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError, run_tool
from vllm_ext.offline.model import OfflineModel, read_tokenizer
from vllm_ext.progress import progress
from vllm_ext.tasks import texts
from vllm_ext.tasks.passages import cut

LENGTH = 512
NUCLEI = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Misses:
    """Of some rows, whose exact scores are the product in float32."""

    greedy: int
    """Rows whose best token is another."""
    tops: dict[int, int]
    """By `top_k`: rows whose k best tokens are not all on the list."""
    nuclei: dict[float, int]
    """By `top_p`: rows whose nucleus is not wholly on it. Why such requests get the stock head."""


def misses(approximate: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, shortlist: int) -> Misses:
    """`[rows, vocab_size]`, `[rows, hidden_size]` and `[vocab_size, hidden_size]`."""
    exact = states.float() @ weight.float().T
    screened = screened_scores(approximate, states, weight, shortlist)
    listed = torch.zeros_like(exact, dtype=torch.bool)
    listed.scatter_(1, approximate.topk(min(shortlist, exact.shape[1])).indices, value=True)
    probabilities, order = exact.softmax(-1).sort(descending=True)
    off_list = ~listed.gather(1, order)
    before = probabilities.cumsum(-1) - probabilities
    most = max(1, shortlist // LISTED_PER_K)
    return Misses(
        int((screened.argmax(-1) != exact.argmax(-1)).sum()),
        {k: int(off_list[:, :k].any(1).sum()) for k in sorted({1, min(10, most), min(40, most), most})},
        {p: int((off_list & (before < p)).any(1).sum()) for p in NUCLEI},
    )


@torch.no_grad()
def measure(source: Checkpoint, tokens: int) -> tuple[int, Misses]:
    """How many rows, and what their lists miss, on held-out prose."""
    passages = cut(read_tokenizer(source), texts.prose("held_out"), tokens=tokens, length=LENGTH, seed=0)
    model = OfflineModel(source)
    weight = model.model.get_output_embeddings().weight.float()  # once, not for every part
    copy, parts = Int4Copy(weight), []
    with progress() as bars:
        for passage in bars.track(passages, description="screening"):
            entered = model.enter(passage[None].to(model.device))
            states = model.normed(entered.state(model, len(model.layers))[0])
            parts += [misses(copy(rows), rows, weight, HeadPlan.shortlist) for rows in states.split(LENGTH // 4)]
    return passages.numel(), _sum(parts)


def _sum(parts: Sequence[Misses]) -> Misses:
    first = parts[0]
    return Misses(
        sum(part.greedy for part in parts),
        {k: sum(part.tops[k] for part in parts) for k in first.tops},
        {p: sum(part.nuclei[p] for part in parts) for p in first.nuclei},
    )


def print_misses(rows: int, found: Misses, name: str) -> None:
    """Counts, and their part of the rows."""
    table = Table(title=f"{name}: a shortlist of {HeadPlan.shortlist} tokens, {rows:,} rows")
    for column in ("what is drawn from", "rows that miss some of it", ""):
        table.add_column(column, justify="right" if table.columns else "left")
    lines = {"the best token (greedy)": found.greedy}
    lines |= {f"top_k {k}": number for k, number in found.tops.items()}
    lines |= {f"top_p {p}, if it were screened": number for p, number in found.nuclei.items()}
    for line, number in lines.items():
        table.add_row(line, f"{number:,}", f"{number / rows:.4%}")
    Console().print(table)


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    tokens: Annotated[int, typer.Option(min=LENGTH, help="Tokens of held-out prose.")] = 16384,
) -> None:
    """Measure how often the shortlist of --head screened misses a token that it should hold, for MODEL."""
    source = Checkpoint.open(model, weights=True)
    if (hidden_size := source.config["hidden_size"]) % GROUP:
        raise UsageError(f"model {model}: hidden_size {hidden_size} is no multiple of {GROUP}; choose another")
    print_misses(*measure(source, tokens), source.called)


if __name__ == "__main__":
    run_tool(main)
