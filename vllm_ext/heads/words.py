"""A larger output space: words of several tokens that character heads spell too, with no new weights.

*SpeLLM* (arXiv 2507.16323, section 1) notes that heads that spell are not bound to the tokenizer's vocabulary. Here a
string of several tokens is one more spelling. Where the heads prefer it to the token that was emitted, and it begins
with that token, its other tokens are offered to vLLM as drafts (speculation by a `custom_class`), which the model
itself verifies: the answer is the model's own, in fewer steps. A string that begins with another token than the one
that was emitted, as it may be where tokens are sampled, is not offered.
"""

import gettext
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoTokenizer
from vllm.config import VllmConfig

from model_executors.attention_plan import CONFIG_KEY
from model_executors.heads.character_head import PAD, slots_by_symbol, slots_of
from model_executors.heads.head_plan import HeadPlan
from model_executors.heads.spelled_rows import spelled_rows
from model_executors.hooks.verify import WORD_PROPOSER
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.heads.vocabulary import CharacterVocabulary, spelled, token_bytes
from vllm_ext.offline.model import read_tokenizer
from vllm_ext.tasks.passages import read_texts

MOST = 20_000
"""Words of a text, the most frequent ones."""
DRAFTS = 4
"""Tokens to offer at once."""
Run = tuple[int, ...]
"""Tokens of a string, two or more."""


class Words:
    """Strings of several tokens with their spellings, the more frequent ones first, by their first token.

    Raises:
        UsageError: where no word is of several tokens and spelled by these heads.

    """

    def __init__(self, words: Mapping[str, int], tokenizer: Any, vocab_size: int, sizes: Sequence[int]) -> None:
        """`words` are counted; `sizes` is how many slots each place has."""
        vocabulary = CharacterVocabulary.of(tokenizer, vocab_size, len(sizes))
        slots = slots_by_symbol(vocabulary.spellings, len(sizes))
        if tuple(map(len, slots)) != tuple(sizes):
            raise UsageError("words: the checkpoint's heads spell another tokenizer's tokens; add the right tokenizer")
        self.runs: list[Run] = []
        found: list[list[int]] = []
        for run, text in runs_of(words, tokenizer, len(sizes)):
            symbols = spelled(text, len(sizes))
            row = [place.get(symbol, PAD) for symbol, place in zip(symbols, slots, strict=False)]
            if PAD not in row:  # each byte is some token's in its place
                self.runs.append(run)
                found.append(row + [PAD] * (len(sizes) - len(row)))
        if not self.runs:
            raise UsageError(
                f"words: of {len(words)} none is of several tokens and at most {len(sizes)} bytes; give others"
            )
        firsts = torch.tensor([run[0] for run in self.runs])
        self.order = firsts.argsort(stable=True)
        self.slots = torch.tensor(found)[self.order]
        self.starts = torch.searchsorted(firsts[self.order], torch.arange(vocab_size + 1))
        self.tokens = slots_of(vocabulary.spellings, len(sizes))[0].long()

    @classmethod
    def of(cls, source: Checkpoint, head: HeadPlan) -> Self:
        """Of a checkpoint with character heads, from the file that its head names."""
        return cls(read_words(Path(head.words)), read_tokenizer(source), source.config["vocab_size"], head.slots)

    def preferred(self, tokens: torch.Tensor, places: torch.Tensor, margin: float = 0.0) -> list[Run]:
        """Of strings that begin with each of `tokens` `[rows]`, the best spelled one, if it is better than the token,
        or worse by less than `margin` nats; else an empty one. `places` `[rows, slots]` are log-probabilities.
        """
        starts = self.starts[tokens]
        counts = self.starts[tokens + 1] - starts
        rows = torch.arange(len(tokens)).repeat_interleave(counts)
        if not len(rows):
            return [()] * len(tokens)
        words = torch.arange(len(rows)) + (starts - counts.cumsum(0) + counts)[rows]
        padded = nn.functional.pad(places.cpu(), (0, 1))  # what `PAD` stands for adds nothing
        scores = padded[rows[:, None], self.slots[words]].sum(1)
        own = padded.gather(1, self.tokens[tokens] % padded.shape[1]).sum(1)
        best = own.new_full((len(tokens),), -torch.inf).scatter_reduce(0, rows, scores, "amax")
        # Of equals the more frequent, which comes first.
        first = torch.full((len(tokens),), len(self.runs)).scatter_reduce(
            0, rows[scores == best[rows]], words[scores == best[rows]], "amin"
        )
        offered = best > own - margin
        return [self.runs[self.order[word]] if good else () for word, good in zip(first, offered, strict=True)]


class WordProposer:
    """vLLM's custom proposer: the rest of the strings that the heads prefer."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        self.plan = HeadPlan.from_hf_config(config.hf_config)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        self.words = Words(read_words(Path(self.plan.words)), tokenizer, config.get_vocab_size(), self.plan.slots)
        self.rows = spelled_rows(vllm_config.instance_id)
        assert vllm_config.speculative_config is not None
        self.most = vllm_config.speculative_config.num_speculative_tokens

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **unused: Any
    ) -> list[list[int]]:
        """Drafts for each request, by its number in the batch; `num_tokens_no_spec` counts the tokens just sampled."""
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        requests, rows = self.rows.last(sampled_token_ids, num_tokens_no_spec.tolist())
        if requests:
            assert self.rows.places is not None
            last = torch.tensor([sampled_token_ids[request][-1] for request in requests])
            runs = self.words.preferred(last, self.rows.places[rows], self.plan.margin)
            for request, run in zip(requests, runs, strict=True):
                drafts[request] = list(run[1 : 1 + self.most])
        return drafts

    def load_model(self, *unused: Any, **also_unused: Any) -> None:
        """There is none to load."""


def with_words(
    source: Checkpoint, overrides: Mapping[str, Any], file: Path, margin: float = HeadPlan.margin
) -> dict[str, Any]:
    """The overrides of a checkpoint's configuration, with its heads spelling a file's words too.

    Raises:
        UsageError: where the head that is served does not spell, or no word is of use to it.

    """
    section: dict[str, Any] = overrides.get(CONFIG_KEY) or source.config.get(CONFIG_KEY, {})
    try:
        head = replace(HeadPlan.from_config(section.get("head")), words=str(file.absolute()), margin=margin)
    except ValueError as error:
        raise UsageError(f"--words {file}: {error}") from error
    Words.of(source, head)
    return {**overrides, CONFIG_KEY: {**section, "head": head.to_config()}}


def speculation(drafts: int = DRAFTS) -> dict[str, Any]:
    """vLLM's `--speculative-config`."""
    return {"method": "custom_class", "model": WORD_PROPOSER, "num_speculative_tokens": drafts}


def runs_of(words: Mapping[str, int], tokenizer: Any, positions: int) -> Iterable[tuple[Run, bytes]]:
    """The tokens of words as they stand after a space, and their bytes: from each token but the last as far as
    `positions` reach, since what is left of a long word is a string too. The most frequent come first.
    """
    text, counted = token_bytes(tokenizer), Counter[Run]()
    for word, count in words.items():
        tokens = tokenizer(f" {word}", add_special_tokens=False).input_ids
        for start in range(len(tokens) - 1):
            end, length = start, 0
            # With room for END, or a longer word that begins alike would be spelled so too.
            while end < len(tokens) and text.get(tokens[end]) and length + len(text[tokens[end]]) < positions:
                length += len(text[tokens[end]])
                end += 1
            if end - start > 1:
                counted[tuple(tokens[start:end])] += count
    return [(run, b"".join(text[token] for token in run)) for run, _ in counted.most_common()]


def read_words(file: Path) -> dict[str, int]:
    """A file's lines, the first one counted as the most frequent.

    Raises:
        UsageError: where it cannot be read or is empty.

    """
    try:
        lines = dict.fromkeys(line.strip() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--words {file}: it cannot be read as text ({error}); give a file of words, a line each"
        ) from error
    if not lines:
        raise UsageError(f"--words {file}: it is empty; write a word a line")
    return {word: len(lines) - number for number, word in enumerate(lines)}


def words_of(texts: Iterable[str]) -> list[str]:
    """The texts' words, the most frequent first."""
    return [word for word, _ in Counter(re.findall(r"\w+", "\n".join(texts))).most_common(MOST)]


def texts_of(file: Path) -> list[str]:
    """As `read_texts`; or of a `.mo` file, the translations that programs ship with in many languages."""
    if file.suffix != ".mo":
        return read_texts(file)
    try:
        with file.open("rb") as opened:
            catalog = gettext.GNUTranslations(opened)
    except OSError as error:
        raise UsageError(f"--text {file}: it cannot be read ({error}); give another file") from error
    return [text for name, text in catalog._catalog.items() if name and isinstance(text, str)]  # type: ignore[attr-defined]
