"""Figures of quality: from scored texts and answers, beside the stock model's, with bootstrapped intervals."""

import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000


@dataclass(frozen=True)
class Scored:
    """Tokens of a text, each after all before it."""

    logprobs: list[float]
    top: list[int]
    """The token that the model ranks first in each place."""


@dataclass(frozen=True)
class Figure:
    """One figure of one model."""

    value: float
    items: int
    ratio: float | None = None
    """To the stock model's."""
    interval: tuple[float, float] | None = None
    """95%, bootstrapped over the items: of the ratio, or of the value where there is no ratio."""


def perplexity(passages: list[Scored], stock: list[Scored] | None, seed: int) -> Figure:
    """Of passages of one length, and its ratio to the stock model's on the same ones."""
    ours = np.array([-np.mean(passage.logprobs) for passage in passages])
    if stock is None:
        return Figure(math.exp(ours.mean()), len(ours))
    more = ours - [-np.mean(passage.logprobs) for passage in stock]
    interval = _interval((more,), lambda each, axis: np.exp(each.mean(axis)), seed)
    return Figure(math.exp(ours.mean()), len(ours), math.exp(more.mean()), interval)


def agreement(passages: list[Scored], stock: list[Scored], seed: int) -> Figure:
    """How often the top token is the stock model's."""
    same = np.array([np.mean(np.equal(ours.top, theirs.top)) for ours, theirs in zip(passages, stock, strict=True)])
    return Figure(float(same.mean()), len(same), None, _interval((same,), lambda each, axis: each.mean(axis), seed))


def accuracy(right: list[float], stock: list[float] | None, seed: int, texts: Sequence[int] = ()) -> Figure:
    """How many answers are right, and the ratio to the stock model's on the same questions; none if that had none.

    Items that ask of one text share its luck: `texts` says how many in a row do, and these are resampled together.
    """
    ours = np.array(right)
    if stock is None or not any(stock):
        return Figure(float(ours.mean()), len(ours))
    theirs = np.array(stock)
    starts = np.cumsum([0, *texts[:-1]]) if texts else np.arange(len(ours))
    of_texts = np.add.reduceat(ours, starts), np.add.reduceat(theirs, starts)
    interval = _interval(of_texts, lambda a, b, axis: a.mean(axis) / b.mean(axis), seed)
    return Figure(float(ours.mean()), len(ours), float(ours.mean() / theirs.mean()), interval)


def mean(scores: list[float], seed: int) -> Figure:
    """Of one model's items, beside none."""
    ours = np.array(scores)
    return Figure(float(ours.mean()), len(ours), None, _interval((ours,), lambda each, axis: each.mean(axis), seed))


def _interval(data: tuple[Any, ...], statistic: Callable[..., Any], seed: int) -> tuple[float, float] | None:
    """The 95% interval over resampled items, taken together from all of `data`; None where there is none."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    if len(data[0]) < 2:
        return None
    # There may be resamples in which the stock model has nothing right; then there is no interval.
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            rng=seed,
        ).confidence_interval
    return (float(found.low), float(found.high)) if math.isfinite(found.low) and math.isfinite(found.high) else None


def is_right(task: str, answer: str, wanted: str) -> bool:
    """Whether the answer's first line, or for sums its first word, is the wanted one, but for case and accents."""
    lines = answer.strip().splitlines() or [""]
    given = lines[0] if task == "capitals" else (lines[0].split() or [""])[0]
    return normalised(given) == normalised(wanted)


def normalised(text: str) -> str:
    """Lower case, without accents and punctuation, words one space apart."""
    letters = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    return " ".join(re.sub(r"[^\w\s-]", "", letters).casefold().split())
