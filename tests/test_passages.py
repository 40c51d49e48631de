"""Passages cut from text, and what is no text."""

import itertools

import pytest

from tests.tiny import TEXT, tokenizer
from vllm_ext.errors import UsageError
from vllm_ext.tasks.passages import cut, read_texts


@pytest.mark.parametrize("bos", [False, True])
def test_passages_are_drawn_from_all_over_the_text_by_the_seed(bos):
    texts = ["short", TEXT, "".join(reversed(TEXT))]
    found = cut(tokenizer(bos), texts, tokens=10 * 50 + 7, length=50, seed=3)
    assert found.shape == (10, 50)
    assert (found[:, 0] == 1).all() == bos
    spelled = ["".join(map(chr, passage[int(bos) :])) for passage in found.tolist()]
    places = sorted(text.index(passage) for passage in spelled for text in texts[1:] if passage in text)
    assert len(places) == 10
    assert len({passage in TEXT for passage in spelled}) == 2
    assert cut(tokenizer(bos), texts, tokens=500, length=50, seed=3).equal(found)
    assert not cut(tokenizer(bos), texts, tokens=500, length=50, seed=4).equal(found)


def test_passages_do_not_overlap():
    found = cut(tokenizer(), [TEXT], tokens=len(TEXT) // 60 * 50, length=50, seed=0)
    places = sorted(TEXT.index("".join(map(chr, passage))) for passage in found.tolist())
    assert all(later - earlier >= 50 for earlier, later in itertools.pairwise(places))


@pytest.mark.parametrize(
    ("texts", "tokens", "message"),
    [
        ([TEXT], 49, "--tokens 49 is less than one passage of 50"),
        ([TEXT[:149]], 200, r"has 2 passages of 50 tokens, fewer than the 4 of --tokens 200"),
        ([TEXT[:49]] * 9, 200, r"has 0 passages of 50 tokens"),
        ([], 200, r"has 0 passages of 50 tokens"),
    ],
)
def test_refuses_too_little_text(texts, tokens, message):
    with pytest.raises(UsageError, match=message):
        cut(tokenizer(), texts, tokens=tokens, length=50, seed=0)


def test_reads_text_files_and_lines_of_json(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "two\u2028three"}\n{"text": "four", "id": 1}\n')
    (tmp_path / "c.md").write_text("no")
    assert read_texts(tmp_path) == ["one", "two\u2028three", "four"]
    assert read_texts(tmp_path / "c.md") == ["no"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "two"}\n{"txt": "four"}\n', 'line 2 is no JSON object with "text"'),
        ("a.jsonl", b'"two"', 'line 1 is no JSON object with "text"'),
        ("a.jsonl", b"", 'line 1 is no JSON object with "text"'),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.pdf", b"text", "no .txt or .jsonl in that folder"),
    ],
)
def test_refuses_text_that_is_none(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_texts(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts(tmp_path / "nowhere")
