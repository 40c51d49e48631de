"""`vllm-ext spell screened`: how often a screened head's shortlist misses what it should hold, on held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from model_executors.heads.head_plan import HeadPlan
from model_executors.heads.screened_head import Int4Copy, rescored
from model_executors.hooks.whole_rows import LISTED_PER_K
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline.model import OfflineModel, read_tokenizer
from vllm_ext.progress import progress
from vllm_ext.tasks import texts
from vllm_ext.tasks.passages import cut

LENGTH = 512
NUCLEI = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Missed:
    """Of some rows, whose exact scores are the product in float32."""

    greedy: int
    """Rows whose best token is another."""
    tops: dict[int, int]
    """By `top_k`: rows whose k best tokens are not all on the list."""
    nuclei: dict[float, int]
    """By `top_p`: rows whose nucleus is not wholly on it. Why such requests get the stock head."""


def missed(approximate: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, shortlist: int) -> Missed:
    """`[rows, vocab_size]`, `[rows, hidden_size]` and `[vocab_size, hidden_size]`."""
    exact = states.float() @ weight.float().T
    screened = rescored(approximate, states, weight, shortlist)
    listed = torch.zeros_like(exact, dtype=torch.bool)
    listed.scatter_(1, approximate.topk(min(shortlist, exact.shape[1])).indices, value=True)
    probabilities, order = exact.softmax(-1).sort(descending=True)
    off_list = ~listed.gather(1, order)
    before = probabilities.cumsum(-1) - probabilities
    most = max(1, shortlist // LISTED_PER_K)
    return Missed(
        int((screened.argmax(-1) != exact.argmax(-1)).sum()),
        {k: int(off_list[:, :k].any(1).sum()) for k in sorted({1, min(10, most), min(40, most), most})},
        {p: int((off_list & (before < p)).any(1).sum()) for p in NUCLEI},
    )


@torch.no_grad()
def measure(source: Checkpoint, tokens: int) -> tuple[int, Missed]:
    """How many rows, and what their lists miss, on held-out prose."""
    passages = cut(read_tokenizer(source), texts.prose("held_out"), tokens=tokens, length=LENGTH, seed=0)
    model = OfflineModel(source)
    weight = model.model.get_output_embeddings().weight.float()  # once, not for every part
    copy, parts = Int4Copy(weight), []
    with progress() as bars:
        for passage in bars.track(passages, description="screening"):
            entered = model.enter(passage[None].to(model.device))
            states = model.normed(entered.state(model, len(model.layers))[0])
            parts += [missed(copy(rows), rows, weight, HeadPlan.shortlist) for rows in states.split(LENGTH // 4)]
    return passages.numel(), _sum(parts)


def _sum(parts: Sequence[Missed]) -> Missed:
    first = parts[0]
    return Missed(
        sum(part.greedy for part in parts),
        {k: sum(part.tops[k] for part in parts) for k in first.tops},
        {p: sum(part.nuclei[p] for part in parts) for p in first.nuclei},
    )


def print_missed(rows: int, found: Missed, name: str) -> None:
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
