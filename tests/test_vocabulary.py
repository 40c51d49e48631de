"""Spellings of five tokenizers: the embedded model's, and four trained on the spot."""

import json
from collections import Counter

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.heads.inspect import print_inspected
from vllm_ext.heads.vocabulary import BYTES, END, OWN, CharacterVocabulary, token_bytes
from vllm_ext.tasks.texts import prose

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCE_PIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
TEXTS = [
    "naïve café — 日本語 🙂",
    "  two  spaces\n\tand a tab",
    "def f(x): return x ** 2",
    "Grüße, Ελλάδα!",
    "1234567890",
]


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])


def split_digits():
    """As Llama 3 and Qwen: a regular expression of its own before the bytes."""
    made, trainer = byte_level()
    words = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, plain])
    return made, trainer


def llama2():
    """SentencePiece's BPE with byte fallback, as tokenizers holds it."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence([*SENTENCE_PIECE, decoders.Strip(" ", 1, 0)])
    return made, trainers.BpeTrainer(vocab_size=2_000, special_tokens=["<unk>", "<s>", *BYTE_TOKENS])


def gemma():
    """SentencePiece's unigrams with byte fallback."""
    made = Tokenizer(models.Unigram([("<unk>", 0.0)], 0, True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence(SENTENCE_PIECE)
    trainer = trainers.UnigramTrainer(vocab_size=2_000, unk_token="<unk>", special_tokens=["<unk>", *BYTE_TOKENS])
    return made, trainer


@pytest.fixture(scope="module", params=["smollm2", "byte_level", "split_digits", "llama2", "gemma"])
def tokenizer(request, smollm2):
    if request.param == "smollm2":
        return AutoTokenizer.from_pretrained(smollm2)
    made, trainer = globals()[request.param]()
    made.train_from_iterator(prose("calibration")[:10] + TEXTS, trainer)
    if request.param in ("llama2", "gemma"):
        made = with_plain_bytes(made)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=None if "byte" in request.param else "<unk>")


def with_plain_bytes(made):
    """Byte tokens are no special ones, but pieces of the model as any other."""
    state = json.loads(made.to_str())
    state["model"]["byte_fallback"] = True  # which training forgets
    state["added_tokens"] = [each for each in state["added_tokens"] if not each["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("positions", [3, 16])
def test_every_token_has_one_spelling_and_every_spelling_one_token(tokenizer, positions):
    vocabulary = CharacterVocabulary.of(tokenizer, len(tokenizer) + 3, positions)
    assert len(vocabulary.spellings) == len(set(vocabulary.spellings)) == len(tokenizer) + 3
    for token, spelled in enumerate(vocabulary.spellings):
        if token in vocabulary.own:
            assert OWN <= spelled[0] < vocabulary.symbols
            assert len(spelled) == 1
        else:
            assert all(symbol < BYTES for symbol in spelled[:-1])
            assert spelled[-1] == END or len(spelled) == positions
            assert len(spelled) <= positions
    assert list(vocabulary.own.values())[-3:] == ["unused"] * 3


def test_spellings_are_the_bytes_that_tokens_write(tokenizer):
    """The bytes of a text's tokens, one after the other, are the text's."""
    vocabulary = CharacterVocabulary.of(tokenizer, len(tokenizer), 64)
    for text in [*TEXTS, prose("held_out")[0][:3_000]]:
        written = b"".join(
            bytes(symbol for symbol in vocabulary.spellings[token] if symbol < BYTES)
            if token not in vocabulary.own
            else token_bytes(tokenizer)[token]
            for token in tokenizer(text, add_special_tokens=False).input_ids
        )
        assert written.decode() in (text, f" {text}")  # Llama 2 puts a space before every text


def test_the_shorter_of_two_that_begin_alike_is_spelled(tokenizer):
    text = token_bytes(tokenizer)
    vocabulary = CharacterVocabulary.of(tokenizer, len(tokenizer), 3)
    beginnings = Counter(each[:3] for token, each in text.items() if len(each) > 3 and token not in vocabulary.own)
    assert max(beginnings.values()) == 1
    assert vocabulary.cut
    for token, why in vocabulary.own.items():
        if why == "same beginning":
            assert len(text[token]) > 3
            assert text[token][:3] in beginnings or text[token][:3] in text.values()


def test_byte_tokens_beside_letters_are_symbols_of_their_own():
    made = Tokenizer(models.WordLevel({"A": 0, "<0x41>": 1, "▁A": 2, "<s>": 3, "AB": 4}, unk_token="A"))
    made.decoder = decoders.Sequence(SENTENCE_PIECE)
    made.add_special_tokens([AddedToken("<s>", special=True)])
    vocabulary = CharacterVocabulary.of(PreTrainedTokenizerFast(tokenizer_object=made), 6, 2)
    assert vocabulary.spellings == ((65, END), (OWN,), (32, 65), (OWN + 1,), (65, 66), (OWN + 2,))
    assert vocabulary.own == {1: "same bytes", 3: "special", 5: "unused"}
    assert vocabulary.cut == ()
    assert vocabulary.coverage([0, 2, 3, 4]) == 0.75


def test_refuses_tokenizers_that_do_not_tell_bytes():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UsageError, match=r"its decoder \(none\) does not tell the tokens' bytes"):
        CharacterVocabulary.of(words, 1)
    with pytest.raises(UsageError, match="--positions 0: choose 1 or more"):
        CharacterVocabulary.of(words, 1, 0)


def test_the_tool_prints_the_coverage(smollm2, capsys):
    print_inspected(Checkpoint.open(str(smollm2), weights=False), 16)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if "│" in line}
    assert rows["tokens"] == "49,152"
    assert rows["symbols of their own: special"] == "17"
    parts = ("spelled to their end", "cut to 16 bytes", "symbols of their own: same beginning")
    assert sum(int(rows[part].replace(",", "")) for part in parts) == 49_152 - 17
    assert float(rows["prose tokens spelled to their end"].rstrip("%")) > 99.9
    assert rows["weights of the character heads"] == f"{(16 * 257 + int(rows['symbols']) - 257) * 576:,}"
