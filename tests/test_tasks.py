"""Tasks out of packages and files."""

import json

import pytest
from transformers import AutoTokenizer

from vllm_ext.errors import UsageError
from vllm_ext.tasks import retrieval
from vllm_ext.tasks.files import read_task
from vllm_ext.tasks.items import Item, Task, item, of_one_text
from vllm_ext.tasks.tasks import DOCUMENT_TOKENS, NAMES, PROSE_TOKENS, bundled


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("name", NAMES)
def test_splits_have_other_items(tokenizer, name):
    """Even the questions differ, not only the examples before them."""

    def asked(split):
        items = bundled(name, tokenizer, 20, split=split).items
        if name in ("prose", "summaries"):
            return {each.prompt for each in items}
        return {tokenizer.decode(each.prompt[-24:] + each.answer).split("\n", 1)[-1] for each in items}

    assert bundled(name, tokenizer, 20) == bundled(name, tokenizer, 20)
    assert bundled(name, tokenizer, 20, seed=1) != bundled(name, tokenizer, 20)
    assert len(asked("judge")) >= 10
    assert not asked("judge") & asked("search")


@pytest.mark.parametrize(
    ("name", "question", "end"), [("capitals", "\nA:", "\n"), ("sums", " =", ","), ("reading", "?\nA:", "\n")]
)
def test_answers_end_where_the_next_question_would_begin(tokenizer, name, question, end):
    for each in bundled(name, tokenizer, 10).items:
        assert tokenizer.decode(each.prompt).endswith(question)
        assert tokenizer.decode(each.answer).endswith(end)


def test_readings_answers_lie_in_the_passage(tokenizer):
    for each in bundled("reading", tokenizer, 10).items:
        name = tokenizer.decode(each.answer).strip()
        passage = tokenizer.decode(each.prompt).rsplit("\n\n", 1)[-1]
        assert f"{name} " in passage.split("Q:")[0]


def test_passages_and_documents_have_one_length(tokenizer):
    prose = bundled("prose", tokenizer, 5).items
    assert {len(each.prompt + each.answer) for each in prose} == {PROSE_TOKENS}
    assert {len(each.answer) for each in prose} == {PROSE_TOKENS // 4}
    summaries = bundled("summaries", tokenizer, 5)
    assert len({len(each.prompt) for each in summaries.items}) == 1
    assert len(summaries.references) == len(summaries.items) == 5


def test_an_item_is_tokenized_as_a_whole(tokenizer):
    found = item(tokenizer, "The answer is 4", "2, surely")
    assert tokenizer.decode(found.prompt + found.answer) == "The answer is 42, surely"
    assert list(found.prompt + found.answer) == tokenizer("The answer is 42, surely").input_ids


SQUAD = {"context": "Rome is old.", "question": "What is old?", "answers": {"text": ["Rome"], "answer_start": [0]}}
SQUAD_FILE = {
    "data": [
        {
            "paragraphs": [
                {"context": "Rome is old.", "qas": [{"question": "What is old?", "answers": [{"text": "Rome"}]}]}
            ]
        }
    ]
}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"prompt": "Rome is old.\nQ: What is old?\nA:", "answer": " Rome\n", "id": 3}),
        json.dumps(SQUAD),
        json.dumps(SQUAD_FILE),
    ],
)
def test_takes_the_papers_files_and_anyones(tokenizer, tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content + "\n")
    task = read_task(tmp_path / "mine.jsonl", tokenizer, 5)
    assert (task.name, task.score, len(task.items)) == ("mine", "answers", 1)
    assert tokenizer.decode(task.items[0].prompt) == "Rome is old.\nQ: What is old?\nA:"
    assert tokenizer.decode(task.items[0].answer) == " Rome\n"


RULER = {"index": 0, "input": "The number for a is: 7. What is the number for a?", "outputs": ["7"], "length": 40}
LONG_BENCH = {"input": "What is old?", "context": "Rome is old.", "answers": ["Rome"], "length": 3, "all_classes": None}


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "depth"),
    [
        (RULER, RULER["input"], " 7", RULER["input"].index("7")),
        (RULER | {"answer_prefix": " It is"}, RULER["input"] + " It is", " 7", RULER["input"].index("7")),
        (LONG_BENCH, "Rome is old.\nQ: What is old?\nA:", " Rome\n", 0),
        ({"prompt": "a b c", "answer": " d", "length": 9}, "a b c", " d", None),
    ],
    ids=["RULER", "RULER with a prefix", "LongBench", "own"],
)
def test_files_with_lengths_are_of_tasks_that_retrieve(tokenizer, tmp_path, row, prompt, answer, depth):
    (tmp_path / "far.jsonl").write_text(json.dumps(row) + "\n")
    task = read_task(tmp_path / "far.jsonl", tokenizer, 5)
    (found,) = task.items
    assert tokenizer.decode(found.prompt) == prompt
    assert tokenizer.decode(found.answer) == answer
    assert task.length == len(found.prompt + found.answer)
    assert found.depth == (None if depth is None else pytest.approx(depth / len(prompt)))


def test_takes_documents_with_their_summaries(tokenizer, tmp_path):
    rows = [{"article": f"{n} and " * DOCUMENT_TOKENS, "highlights": f"number {n}"} for n in range(3)]
    (tmp_path / "news.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = read_task(tmp_path / "news.jsonl", tokenizer, 2)
    assert task.score == "summaries"
    assert len(task.items) == len(set(task.references)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("{}", "line 1 has none of the forms prompt, answer; input, outputs; "),
        ('{"prompt": "a", "answer": "b"}\nnothing', "line 2 has none"),
        ('{"prompt": "a", "answer": "b"}\n{"text": "c"}', "lines are of several forms"),
        ('{"text": "short"}', f"no text is as long as {PROSE_TOKENS} tokens"),
        ('{"article": "short", "highlights": "x"}', f"no document is as long as {DOCUMENT_TOKENS} tokens"),
    ],
)
def test_refuses_other_files(tokenizer, tmp_path, content, message):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_task(tmp_path / "mine.jsonl", tokenizer, 5)
    with pytest.raises(UsageError, match="cannot be read"):
        read_task(tmp_path / "nowhere.jsonl", tokenizer, 5)


@pytest.mark.parametrize("name", retrieval.NAMES)
def test_what_is_asked_for_was_told_where_the_item_says(tokenizer, name):
    task = retrieval.retrieval(name, tokenizer, 512, 8)
    assert task.length == 512
    assert task.name == f"{name} at 512"
    depths = sorted(each.depth for each in task.items)
    assert depths[0] < 0.2 < 0.6 < depths[-1]
    for each in task.items:
        text, answer = tokenizer.decode(each.prompt), tokenizer.decode(each.answer)
        assert 490 <= len(each.prompt + each.answer) <= 512
        if name == "shots":
            assert text.index("It is") / len(text) == pytest.approx(each.depth, abs=0.05)
            continue
        told = answer.strip().split(", ")
        places = [text.index(part) / len(text) for part in told]
        assert min(abs(place - each.depth) for place in places) < 0.05


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [*(("needles", "judge", count) for count in (1, 3, 4, 8, 10)), ("words", "search", 8), ("facts", "search", 7)],
)
def test_several_keys_are_asked_for_in_one_text_each(tokenizer, name, split, count):
    task = retrieval.retrieval(name, tokenizer, 512, count, split=split)
    groups = list(of_one_text(task.items))
    assert [len(items) for items, _ in groups] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert sum(len(items) for items, _ in groups) == len(task.items) == count
    for items, shared in groups:
        assert len({each.prompt for each in items}) == len(items)
        assert shared > 400 or len(items) == 1
        assert len(items) < 4 or max(each.depth for each in items) - min(each.depth for each in items) > 0.3
    if count == 8:
        assert task.tokens < 0.4 * sum(len(each.prompt + each.answer) for each in task.items)


def test_texts_are_told_apart():
    a, b, c = (Item((*range(5, 15), *more), (1,)) for more in ((), (7,), (8, 9, 4)))
    other = Item(tuple(range(30, 40)), (1,))
    half = Item((*range(5, 10), *range(40, 45)), (1,))
    assert list(of_one_text([])) == []
    assert list(of_one_text([a])) == [([a], 0)]
    assert list(of_one_text([b, c])) == [([b, c], 10)]
    assert list(of_one_text([b, a, c])) == [([b, a, c], 9)]  # each prompt has a token of its own
    assert list(of_one_text([a, other, c])) == [([a], 0), ([other], 0), ([c], 0)]
    assert list(of_one_text([b, half])) == [([b], 0), ([half], 0)]
    assert Task("t", "answers", (b, c, other)).tokens == 10 + 2 + 4 + 11


@pytest.mark.parametrize("name", retrieval.NAMES)
def test_items_that_retrieve_are_of_their_split_and_seed(tokenizer, name):
    made = {
        (split, seed): retrieval.retrieval(name, tokenizer, 256, 4, seed, split)
        for split in ("search", "judge")
        for seed in (0, 1)
    }
    assert made["search", 0] == retrieval.retrieval(name, tokenizer, 256, 4, 0, "search")
    prompts = [each.prompt for task in made.values() for each in task.items]
    assert len(set(prompts)) == 16
