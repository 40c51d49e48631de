"""The texts as their users find them. Nothing here is downloaded: they come with installed packages."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from vllm_ext.tasks import texts


@pytest.fixture(scope="module")
def calibration():
    return texts.prose("calibration")


@pytest.fixture(scope="module")
def held_out():
    return texts.prose("held_out")


def test_no_article_is_in_both_splits(calibration, held_out):
    assert not set(calibration) & set(held_out)
    openings = [text[:100] for text in calibration + held_out]
    assert len(set(openings)) == len(openings)


def test_the_same_texts_every_time(calibration, held_out):
    texts._articles.cache_clear()
    assert texts.prose("calibration") == calibration
    assert texts.prose("held_out") == held_out


def test_there_is_enough(calibration, held_out, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert sum(len(tokens) for tokens in tokenizer(calibration).input_ids) > 200_000
    lengths = [len(tokens) for tokens in tokenizer(held_out).input_ids]
    assert sum(lengths) > 150_000
    assert sum(length > 2048 for length in lengths) >= 16


def test_reads_as_prose(calibration, held_out):
    for text in calibration + held_out:
        for paragraph in text.split("\n\n"):
            assert paragraph[0].isupper() or paragraph[0] in '"('
            assert paragraph.rstrip(')"')[-1] in ".!?"
            assert len(paragraph) >= texts.MIN_PARAGRAPH
            assert not any(mark in paragraph for mark in ("''", "{{", "}}", "[[", "]]", "==", "<ref", "&nbsp;", "\n"))


def test_paragraphs_lose_markup_and_those_with_holes_go():
    padding = "It goes on for some time, as paragraphs in an encyclopedia do, and then comes to its end. " * 3
    good = f"'''Aa''' (; born 1900) is a ''river''. {padding}"
    hole = f"It flows for  through the land. {padding}"
    text = f"== Aa ==\n{good}\n* an item of a list. {padding}\n{hole}\nA caption."
    assert list(texts._paragraphs(text)) == [f"Aa (born 1900) is a river. {padding}".strip()]


def test_capitals():
    capitals = texts.capitals()
    assert capitals["France"] == "Paris"
    assert capitals["Japan"] == "Tokyo"
    assert len(capitals) > 150
    assert len(set(capitals.values())) == len(capitals)


def test_sums():
    sums = texts.sums(seed=0, n=200)
    assert sums == texts.sums(seed=0, n=200)
    assert sums != texts.sums(seed=1, n=200)
    assert len(set(sums)) == 200
    assert all(10 <= a <= 99 and 10 <= b <= 99 for a, b in sums)
    assert len(set(texts.sums(seed=0, n=8100))) == 8100


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_needs_neither_torch_nor_vllm():
    code = "import sys; from vllm_ext.tasks import texts; texts.prose('held_out'); texts.capitals()"
    assert python(f"{code}; print([name for name in ('torch', 'vllm') if name in sys.modules])") == "[]"


@pytest.mark.parametrize(("package", "call"), [("gensim", "prose('held_out')"), ("countryinfo", "capitals()")])
def test_names_the_extra_that_is_missing(package, call):
    code = f"""
import sys
sys.modules[{package!r}] = None  # as if it were not installed
from vllm_ext import errors
from vllm_ext.tasks import texts
try:
    texts.{call}
except errors.UsageError as error:
    print(error)
"""
    assert python(code) == (
        f"the package {package}, which carries the texts, is not installed; install vllm-ext[quality]"
    )
