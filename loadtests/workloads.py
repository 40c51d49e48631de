"""What is asked: prompts and answers of exact lengths, from a seed.

Prompts are never the same twice, so that prefix caching cannot disguise prefill; `sharedprefix` shares one on purpose.
Completions are asked with token ids, which need no tokenizer. Chat needs text: words that are one token each, found
with the server's `/tokenize` (vLLM has it) or a local tokenizer; without either a word counts as one, approximately.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_TOKEN = 1_000
"""Token ids are drawn from here to the vocabulary's size: below lie bytes and special tokens."""
WORDS = re.findall(
    r"\w+",
    """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy music market sense nation plan college interest death experience effect use class
control care field development role effort rate heart drug show leader light voice wife whole police mind price report
decision son view relationship town road arm difference value building action season society tax director position
""",
)


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    profile: str
    id: str
    path: str
    body: bytes
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Profile:
    """Lengths in tokens, drawn uniformly between two."""

    prompt: tuple[int, int]
    answer: tuple[int, int]
    shared: int = 0
    """Tokens that all prompts begin with, besides."""


PROFILES = {
    "chat": Profile((32, 256), (128, 256)),
    "rag": Profile((1024, 3072), (32, 96)),
    "summarise": Profile((768, 2048), (128, 256)),
    "generate": Profile((16, 64), (512, 1024)),
    "longcontext": Profile((4096, 8192), (128, 256)),
    "sharedprefix": Profile((32, 128), (64, 128), 1024),
}
MIXED = ("chat", "rag", "summarise", "generate")
NAMES = (*PROFILES, "mixed")


@dataclass(frozen=True)
class Texts:
    """What prompts of text are made of."""

    words: tuple[str, ...] = tuple(WORDS)
    """One token each, after a space."""
    around: int = 0
    """Tokens that the chat template adds."""
    exact: bool = False


@dataclass(frozen=True)
class Workload:
    """Requests by their number: the same seed and number give the same request."""

    profile: str
    model: str
    api: str = "completions"
    seed: int = 0
    scale: float = 1.0
    vocab_size: int = 32_000
    texts: Texts | None = None
    """None asks with token ids; chat needs some."""
    text_seed: int | None = None
    """Of the prompts' texts where it is not `seed`: the same lengths can be asked again, of a server that caches."""

    def __post_init__(self) -> None:
        if self.profile not in NAMES:
            raise ValueError(f"profile {self.profile!r}: take one of {', '.join(NAMES)}")
        if self.api not in ("chat", "completions"):
            raise ValueError(f"api {self.api!r}: take chat or completions")
        if not self.scale > 0:
            raise ValueError(f"scale {self.scale:g}: it multiplies lengths; give one above 0")
        if self.vocab_size <= FIRST_TOKEN:
            raise ValueError(f"vocab-size {self.vocab_size}: token ids are drawn from {FIRST_TOKEN:,} up")
        if self.api == "chat" and self.texts is None:
            raise ValueError("api 'chat' needs words to ask with")

    def request(self, number: int) -> Request:
        """The request of that number."""
        shared, prompt, answer = self._lengths(random.Random(f"{self.profile}/{self.seed}/{number}"))
        return self.build(number, shared, prompt, answer)

    def under_way(self, count: int) -> Iterator[Request]:
        """Requests as they are met at any one time: in the middle, what has been answered of them in their prompts.

        Those with long answers are met more often. Their numbers are negative.
        """
        dice = random.Random(f"{self.profile}/{self.seed}/under way")
        longest = self._scaled(max(profile.answer[1] for profile in self._profiles))
        number = -1
        while number >= -count:
            shared, prompt, answer = self._lengths(dice)
            if dice.random() < answer / longest:
                done = dice.randrange(answer)
                yield self.build(number, shared, prompt + done, answer - done)
                number -= 1

    @property
    def mean_answer(self) -> float:
        """Tokens of an answer on average."""
        return self.scale * sum(sum(profile.answer) / 2 for profile in self._profiles) / len(self._profiles)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a prompt and its answer on average."""
        prompts = sum(profile.shared + sum(profile.prompt) / 2 for profile in self._profiles) / len(self._profiles)
        return self.scale * prompts + self.mean_answer

    @property
    def _profiles(self) -> list[Profile]:
        return [PROFILES[name] for name in (MIXED if self.profile == "mixed" else (self.profile,))]

    def _lengths(self, dice: random.Random) -> tuple[list[Any], int, int]:
        """The shared tokens, which are the profile's own whatever the seed, and the lengths of prompt and answer."""
        profile = dice.choice(self._profiles)
        shared = self._draw(random.Random("shared"), self._scaled(profile.shared))
        return shared, self._scaled(dice.randint(*profile.prompt)), self._scaled(dice.randint(*profile.answer))

    def build(self, number: int, shared: list[Any], prompt: int, answer: int) -> Request:
        """A request of `prompt` tokens after the shared ones, answered with exactly `answer`."""
        seed = self.seed if self.text_seed is None else self.text_seed
        dice = random.Random(f"{self.profile}/{seed}/{number}/text")
        around = self.texts.around if self.texts else 0
        fresh = max(prompt - around, 1)
        tokens = [*shared, *self._draw(dice, fresh)]
        body = {
            "model": self.model,
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # The first word has no space before it, so it is always the one whose tokens were counted.
        text: Any = "".join([WORDS[0], *tokens[1:]]) if self.texts else tokens
        if self.api == "chat":
            body |= {"messages": [{"role": "user", "content": text}]}
        else:
            body |= {"prompt": text}
        path = "/v1/chat/completions" if self.api == "chat" else "/v1/completions"
        name = f"{self.profile}-{seed}-{number}"
        return Request(self.profile, name, path, json.dumps(body).encode(), len(tokens) + around, answer)

    def _draw(self, dice: random.Random, count: int) -> list[Any]:
        if self.texts:
            return [f" {word}" for word in dice.choices(self.texts.words, k=count)]
        return dice.choices(range(FIRST_TOKEN, self.vocab_size), k=count)

    def _scaled(self, tokens: int) -> int:
        return max(1, round(tokens * self.scale)) if tokens else 0


def single_token_words(count: Callable[[str], int]) -> Texts:
    """The words that are one token each in a message, by `count`: a whole prompt's tokens, its template included.

    Raises:
        ValueError: where no such words are found, or a prompt of them has another length than follows.

    """
    base = count(WORDS[0])
    found = tuple(word for word in WORDS if count(f"{WORDS[0]} {word}") == base + 1)
    around = base - 1
    dice = random.Random(0)
    if len(found) >= 32 and count(" ".join([WORDS[0], *dice.choices(found, k=200)])) == base + 200:
        return Texts(found, around, exact=True)
    raise ValueError(f"only {len(found)} of {len(WORDS)} words are one token each; ask completions, with token ids")


@dataclass(frozen=True)
class Traced:
    """One line of a trace."""

    arrival: float
    prompt_tokens: int
    answer_tokens: int


def read_trace(file: Path) -> list[Traced]:
    """Lines of `{"arrival": seconds, "prompt_tokens": n, "answer_tokens": n}`, in the order of arrival.

    Raises:
        ValueError: naming the line that is none.

    """
    traced = []
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"trace {file}: {error.strerror}; name a file of JSON lines") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            one = Traced(float(row["arrival"]), int(row["prompt_tokens"]), int(row["answer_tokens"]))
            if one.arrival < 0 or one.prompt_tokens < 1 or one.answer_tokens < 1:
                raise ValueError
        except (ValueError, TypeError, KeyError) as error:
            wanted = '{"arrival": seconds, "prompt_tokens": n, "answer_tokens": n}'
            raise ValueError(f"trace {file.name}, line {number}: {line[:60]!r} is not {wanted}") from error
        traced.append(one)
    if not traced:
        raise ValueError(f"trace {file.name}: it has no lines")
    return sorted(traced, key=lambda each: each.arrival)


def replay(trace: list[Traced], workload: Workload) -> Iterator[tuple[float, Request]]:
    """The trace's requests with their arrivals; their texts are the seed's."""
    for number, each in enumerate(trace):
        yield each.arrival, workload.build(number, [], each.prompt_tokens, each.answer_tokens)
