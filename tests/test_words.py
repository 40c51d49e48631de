"""Words of several tokens: how they are spelled, when they are offered, and that answers stay the model's own."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from model_executors.heads.character_head import slots_of
from model_executors.heads.head_plan import HeadPlan, head_tensor_name
from model_executors.heads.spelled_rows import SpelledRows
from tests.engines import answers, engine
from tests.spelled import SpelledReference, random_tensors
from tests.test_vocabulary import byte_level
from tests.tiny import prompts, write_tiny
from vllm_ext.checkpoint import Checkpoint, Trained, write_planned
from vllm_ext.errors import UsageError
from vllm_ext.heads.vocabulary import BYTES, CharacterVocabulary, token_bytes
from vllm_ext.heads.words import WordProposer, Words, read_words, runs_of, speculation, texts_of, with_words, words_of
from vllm_ext.served import Served

VOCAB_SIZE, PLACES, NEW_TOKENS = 400, 11, 24
LENGTHS = (3, 17, 40)


def write_model(folder, threshold=0.0):
    """A tiny Llama with a tokenizer, and random heads that spell it."""
    stock = folder / "stock"
    write_tiny("Llama", stock, vocab_size=VOCAB_SIZE)
    made, trainer = byte_level()
    trainer.vocab_size = VOCAB_SIZE
    chosen = random.Random(0)
    text = [" ".join(chosen.choice(["the", "catapult", "catalogue", "concat"]) for _ in range(60)) for _ in range(50)]
    text += ["".join(chosen.choice("etaoinshrdlu  ") for _ in range(400)) for _ in range(50)]
    made.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    tokenizer.save_pretrained(stock)
    spellings, slots = slots_of(CharacterVocabulary.of(tokenizer, VOCAB_SIZE, PLACES).spellings, PLACES)
    head = HeadPlan("char", slots=slots, threshold=threshold)
    source = Checkpoint.open(str(stock), weights=True)
    tensors = random_tensors(head.shape(source.config["hidden_size"], VOCAB_SIZE), spellings)
    tensors["bias"][BYTES : slots[0]] = -20.0  # tokens without bytes, which cost one symbol only
    named = {head_tensor_name(name): tensor for name, tensor in tensors.items()}
    write_planned(source, source.planned({}), folder / "spelled", None, Trained(head, named, {}, {"text": "random"}))
    return folder / "spelled"


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def tokenizer(spelled):
    return PreTrainedTokenizerFast.from_pretrained(spelled)


@pytest.fixture(scope="module")
def expected(spelled):
    """What the plain loop answers, a token at a time."""
    reference = SpelledReference(spelled, {})
    return [reference.answer(prompt, NEW_TOKENS).tokens for prompt in prompts(LENGTHS)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    out = tmp_path_factory.mktemp("file") / "words.txt"
    out.write_text("\n".join(["catapults", "concatenate", "dogma", "saturation"]))
    return out


@pytest.fixture
def answered(expected, tokenizer, monkeypatch):
    """In place of the words' tokens: what is answered, whatever text that would be, and what begins like it."""
    text = token_bytes(tokenizer)
    runs = {tuple(answer[at : at + length]) for answer in expected for at in range(len(answer)) for length in (2, 3)}
    runs |= {(*run[:-1], other[0]) for run, other in zip(sorted(runs), sorted(runs, key=sum), strict=True)}
    spelled = [(run, b"".join(text.get(token, b"") for token in run)) for run in sorted(runs) if len(run) > 1]
    spelled = [(run, each) for run, each in spelled if all(text.get(token) for token in run) and len(each) < PLACES]
    monkeypatch.setattr("vllm_ext.heads.words.runs_of", lambda *_: spelled)


def words_from(spelled, file):
    source = Checkpoint.open(str(spelled), weights=True)
    return Words(read_words(file), PreTrainedTokenizerFast.from_pretrained(spelled), VOCAB_SIZE, source.head.slots)


def test_runs_reach_as_far_as_the_places(tokenizer):
    tokens, text = tokenizer(" catapults").input_ids, token_bytes(tokenizer)
    found = list(runs_of({"catapults": 1}, tokenizer, PLACES))
    assert found
    for run, spelling in found:
        start = next(at for at in range(len(tokens)) if tokens[at : at + len(run)] == list(run))
        assert b"".join(text[token] for token in run) == spelling
        assert len(spelling) < PLACES
        after = tokens[start + len(run) : start + len(run) + 1]
        assert not after or len(spelling) + len(text[after[0]]) >= PLACES


def test_frequent_runs_come_first(tokenizer):
    found = [run for run, _ in runs_of({"zq": 1, "qz": 5}, tokenizer, PLACES)]
    q, z = (tokenizer(letter).input_ids[0] for letter in "qz")
    assert found.index((q, z)) < found.index((z, q))


@pytest.mark.parametrize("margin", [0.0, 2.0, float("inf")])
def test_prefers_the_best_spelled_string_that_begins_with_the_token(spelled, file, answered, margin):
    """Against a loop over all strings and their symbols."""
    words = words_from(spelled, file)
    source = Checkpoint.open(str(spelled), weights=True)
    places = -torch.randn(VOCAB_SIZE, sum(source.head.slots), generator=torch.Generator().manual_seed(0)).abs()

    def score(spelling, row):
        return sum(row[slot] for slot in spelling.tolist() if slot >= 0)

    found = words.preferred(torch.arange(VOCAB_SIZE), places, margin)
    kept = {words.runs[which]: words.slots[at] for at, which in enumerate(words.order.tolist())}
    for token, row in enumerate(places):
        best, own = (), score(words.tokens[token], row) - margin
        for run in words.runs:
            if run[0] == token and score(kept[run], row) > own + 1e-5:
                best, own = run, score(kept[run], row)
        assert found[token] == best
    assert any(found)
    assert bool(margin) or not all(found[run[0]] for run in words.runs)


def test_equally_spelled_the_more_frequent_wins(spelled, file, answered):
    words = words_from(spelled, file)
    level = torch.zeros(1, words.slots.max() + 1)
    first = words.runs[0][0]
    assert words.preferred(torch.tensor([first]), level, margin=1.0) == [words.runs[0]]


def test_the_row_of_the_last_token_counts():
    rows = SpelledRows()
    # In their prompt; a first token; two drafts of which one is right; two drafts, both right; no drafts.
    rows.begin(torch.tensor([8, 5, 12, 9, 7, 99]))
    rows.keep(torch.zeros(9, 2))
    rows.keep(torch.zeros(3, 2))  # of prompt_logprobs
    sampled = [[], [1], [1, 2], [1, 2, 3], [4]]
    assert rows.last(sampled, [20, 6, 12, 10, 8]) == ([1, 2, 3, 4], [1, 3, 7, 8])


@pytest.mark.parametrize(("ends", "number"), [(None, 1), (torch.tensor([5]), 2)])
def test_offers_nothing_where_rows_do_not_add_up(ends, number):
    rows = SpelledRows()
    rows.begin(ends)
    rows.keep(torch.zeros(number, 2))
    assert rows.last([[3]], [6]) == ([], [])
    rows.begin(torch.tensor([5]))
    assert rows.last([[3]], [6]) == ([], [])


@pytest.mark.parametrize("margin", [0.0, 100.0])
def test_answers_stay_the_models_own_in_fewer_steps(spelled, file, expected, answered, monkeypatch, margin):
    overrides = with_words(Checkpoint.open(str(spelled), weights=True), {}, file, margin)
    sampled, drafts = [], []
    original = WordProposer.propose

    def propose(self, new, *args, **kwargs):
        made = original(self, new, *args, **kwargs)
        sampled.append([list(each) for each in new])
        drafts.append(made)
        return made

    monkeypatch.setattr(WordProposer, "propose", propose)
    with engine(spelled, hf_overrides=overrides, speculative_config=speculation(), skip_tokenizer_init=False) as llm:
        given = answers(llm, prompts(LENGTHS), NEW_TOKENS)
        alone = answers(llm, prompts(LENGTHS)[1:2], NEW_TOKENS, prompt_logprobs=False)
    assert [answer.tokens for answer in given] == expected
    assert alone[0].tokens == expected[1]
    assert any(draft for step in drafts for draft in step)
    if margin:
        assert any(len(new) > 1 for step in sampled for new in step)
        assert len(sampled) < 2 * NEW_TOKENS
    for step, made in zip(sampled, drafts, strict=True):
        for new, draft in zip(step, made, strict=True):
            assert not draft or new


def test_what_is_offered_is_of_the_row_that_the_token_came_from(spelled, file, expected, answered, monkeypatch):
    """Each draft, against the heads on the same text in the plain loop."""
    overrides = with_words(Checkpoint.open(str(spelled), weights=True), {}, file, 3.0)
    words, reference = words_from(spelled, file), SpelledReference(spelled, {})
    offered = []
    original = WordProposer.propose

    def propose(self, new, lengths, tokens, **kwargs):
        made = original(self, new, lengths, tokens, **kwargs)
        offered.extend(
            (tokens[at, : lengths[at]].tolist(), draft)
            for at, (each, draft) in enumerate(zip(new, made, strict=False))
            if each
        )
        return made

    monkeypatch.setattr(WordProposer, "propose", propose)
    with engine(spelled, hf_overrides=overrides, speculative_config=speculation(), skip_tokenizer_init=False) as llm:
        answers(llm, prompts(LENGTHS), NEW_TOKENS, prompt_logprobs=False)
    weight, bias = reference.tensors["weight"], reference.tensors["bias"]
    for tokens, draft in offered:
        state = reference.model.model(torch.tensor([tokens[:-1]]), use_cache=False).last_hidden_state[0, -1]
        places = (weight @ state + bias).split(reference.head.slots)
        row = torch.cat([part.log_softmax(0) for part in places])[None]
        (run,) = words.preferred(torch.tensor(tokens[-1:]), row, 3.0)
        assert draft == list(run[1:5])
    assert sum(bool(draft) for _, draft in offered) >= 3


def test_translations_are_text():
    """Of a program that every Debian has, if it has its translations."""
    catalogs = sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/*.mo"))
    if not catalogs:
        pytest.skip("no translations on this machine")
    assert words_of(texts_of(catalogs[0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty; write a word a line"),
        ("\n\n", "it is empty"),
        ("the\ncatapult", "none is of several tokens"),
        (None, "cannot be read as text"),
        (b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_refuses_words(spelled, tmp_path, content, message):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        with_words(Checkpoint.open(str(spelled), weights=True), {}, file)


def test_refuses_heads_that_do_not_spell(spelled, file):
    source = Checkpoint.open(str(spelled), weights=True)
    with pytest.raises(UsageError, match="nothing is spelled here"):
        with_words(source, Served.open(str(spelled), None, "stock").hf_overrides(), file)


def test_refuses_words_without_their_proposer(spelled, file):
    overrides = with_words(Checkpoint.open(str(spelled), weights=True), {}, file)
    with (
        pytest.raises(ValueError, match="is missing; serve with vllm-ext serve --words"),
        engine(spelled, hf_overrides=overrides),
    ):
        pass
