"""What quality is measured with, and what tensors are fitted on: prose, capitals and sums, out of PyPI packages.

The prose is articles of the English Wikipedia (CC BY-SA) that gensim carries for its own tests; the capitals are
countryinfo's. Both come with the extra `quality`. No hub is asked for anything.
"""

import bz2
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Literal

from vllm_ext.errors import UsageError

Split = Literal["calibration", "held_out"]

ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
HELD_OUT_EVERY = 3
"""One article in so many is held out."""
MIN_ARTICLE = 2_000
"""Characters of prose; shorter articles are redirects, lists and stubs."""
MIN_PARAGRAPH = 200
"""Characters; shorter lines are headings, captions and items of lists."""
MIN_POPULATION = 500_000
"""Below it are mostly territories, whose capitals hardly any text names."""

# Where a template stood, the markup's removal leaves a hole: two spaces, or one before a full stop.
HOLE = re.compile(r"[^.]  |\s[.,;)]|\(\s*[,;.)]")
SENTENCES = re.compile(r"[A-Z\"(].*[.!?][\")]*", re.DOTALL)


def prose(split: Split) -> list[str]:
    """Articles as plain paragraphs, in the order they lie in; those of the two splits are different articles.

    Raises:
        UsageError: where gensim is not installed.

    """
    held_out = split == "held_out"
    return [article for number, article in enumerate(_articles()) if (number % HELD_OUT_EVERY == 0) == held_out]


def prose_source() -> str:
    """Where the prose comes from, for the provenance of what is fitted on it.

    Raises:
        UsageError: where gensim is not installed.

    """
    _articles()
    return f"gensim {version('gensim')}: {ARTICLES}"


def capitals() -> dict[str, str]:
    """The capital of each country of some size, in the order of the countries' names.

    Raises:
        UsageError: where countryinfo is not installed.

    """
    try:
        from countryinfo import all_countries
    except ImportError:
        raise missing("countryinfo") from None
    found: dict[str, str] = {}
    for country in sorted(all_countries(), key=lambda country: country.name()):
        capital = country.capital()
        # A few states are listed twice, under an older name too.
        if isinstance(capital, str) and capital not in found.values() and (country.population() or 0) >= MIN_POPULATION:
            found[country.name()] = capital
    return found


def capital_question(country: str) -> str:
    """What asks for its capital."""
    return f"Q: What is the capital of {country}?\nA:"


def sums(seed: int, n: int) -> list[tuple[int, int]]:
    """`n` different pairs of two-digit numbers to add."""
    pairs = random.Random(seed).sample(range(90 * 90), n)
    return [(10 + pair // 90, 10 + pair % 90) for pair in pairs]


@cache
def _articles() -> tuple[str, ...]:
    """Every article with enough prose."""
    try:
        from gensim.corpora.wikicorpus import extract_pages, filter_wiki
        from gensim.test.utils import datapath
    except ImportError:
        raise missing("gensim") from None
    with bz2.open(datapath(ARTICLES)) as dump:
        articles = ["\n\n".join(_paragraphs(filter_wiki(text))) for _, text, _ in extract_pages(dump)]
    return tuple(article for article in articles if len(article) >= MIN_ARTICLE)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of an article that read as ordinary prose."""
    for line in text.splitlines():
        paragraph = re.sub(r"'{2,}", "", line).strip()
        paragraph = re.sub(r"\((?:[;,]\s*)+", "(", paragraph).replace(" ()", "")
        if len(paragraph) >= MIN_PARAGRAPH and SENTENCES.fullmatch(paragraph) and not HOLE.search(paragraph):
            yield paragraph


def missing(package: str) -> UsageError:
    """What to raise where a package with texts is not installed."""
    return UsageError(f"the package {package}, which carries the texts, is not installed; install vllm-ext[quality]")
