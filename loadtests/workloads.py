"""What is asked: prompts and answers of exact lengths, from a seed.

Prompts are never the same twice, so that prefix caching cannot disguise prefill, but for what they share on purpose: a
prefix, or the turns before. Completions are asked with token ids, which need no tokenizer. Chat needs text: words that
are one token each, found with the server's `/tokenize` (vLLM has it) or a local tokenizer; without either a word counts
as one, approximately.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loadtests.conversations import Conversation, Request, Turn
from loadtests.draws import Even
from loadtests.needles import needle
from loadtests.sharegpt import Dialogue
from loadtests.texts import WORDS, Texts
from loadtests.traces import BLOCK_TOKENS, Traced

FIRST_TOKEN = 1_000
"""Token ids are drawn from here to the vocabulary's size: below lie bytes and special tokens."""


@dataclass(frozen=True)
class Profile:
    """Lengths in tokens, drawn uniformly between two."""

    prompt: tuple[int, int]
    """Of each turn."""
    answer: tuple[int, int]
    shared: int = 0
    """Tokens that prompts begin with, besides."""
    turns: tuple[int, int] = (1, 1)
    think: float = 0.0
    """Seconds between an answer and the next turn, on average."""


PROFILES = {
    "chat": Profile((32, 256), (128, 256)),
    "rag": Profile((1024, 3072), (32, 96)),
    "summarise": Profile((768, 2048), (128, 256)),
    "generate": Profile((16, 64), (512, 1024)),
    "longcontext": Profile((4096, 8192), (128, 256)),
    "sharedprefix": Profile((32, 128), (64, 128), 1024),
    "conversation": Profile((32, 256), (64, 256), turns=(3, 8), think=5.0),
    "agent": Profile((64, 512), (32, 128), 1024, turns=(6, 16), think=1.0),
}
MIXED = ("chat", "rag", "summarise", "generate")
DATASET, TRACE = "dataset", "trace"
NAMES = (*PROFILES, "mixed", DATASET, TRACE)


@dataclass(frozen=True)
class Workload:
    """Conversations by their number: the same seed and number give the same one."""

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
    turns: int = 0
    """Turns of every conversation; 0 is as the profile has it."""
    think: float = -1.0
    """Seconds of thought before a turn, on average; below 0 as the profile has it."""
    prefixes: int = 1
    """How many different prefixes are shared."""
    prefix_tokens: int = -1
    """Tokens of each; below 0 as the profile has it."""
    prefix_share: float = 1.0
    """The part of conversations that begin with one."""
    needles: float = 0.0
    """The part of conversations that are a question with a known answer."""
    dialogues: tuple[Dialogue, ...] = ()
    """For the profile `dataset`."""
    trace: tuple[Traced, ...] = ()
    """For the profile `trace`."""
    even: bool = False
    """Whether lengths, and all else that is drawn, are spread evenly over conversations in a row; else by chance."""

    def __post_init__(self) -> None:
        if self.profile not in NAMES:
            raise ValueError(f"workload {self.profile!r}: take one of {', '.join(NAMES)}")
        if self.api not in ("chat", "completions"):
            raise ValueError(f"api {self.api!r}: take chat or completions")
        if not self.scale > 0:
            raise ValueError(f"scale {self.scale:g}: it multiplies lengths; give one above 0")
        if self.vocab_size <= FIRST_TOKEN:
            raise ValueError(f"vocab-size {self.vocab_size}: token ids are drawn from {FIRST_TOKEN:,} up")
        if self.api == "chat" and self.texts is None:
            raise ValueError("api 'chat' needs words to ask with")
        for name, part in (("prefix-share", self.prefix_share), ("needles", self.needles)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name} {part:g}: it is a part of all requests; give one in [0, 1]")
        if self.turns < 0 or self.prefixes < 1:
            raise ValueError(f"turns {self.turns}, prefixes {self.prefixes}: give at least 0, and at least 1")
        if (self.profile == TRACE) != bool(self.trace) or (self.profile == DATASET) != bool(self.dialogues):
            raise ValueError(f"workload {self.profile!r}: trace goes with --trace FILE, dataset with --dataset FILE")
        if self.profile == DATASET and self.api != "chat":
            raise ValueError("workload 'dataset': its conversations are asked as chat; add --api chat")

    def conversation(self, number: int) -> Conversation:
        """The conversation of that number."""
        if self.profile == DATASET:
            return self._dialogue(number)
        if self.profile == TRACE:
            return self._traced(number)
        dice = self._dice(number)
        profile = dice.choice(self._profiles)
        shared, count = self._shared(profile, dice), dice.randint(*profile.turns)
        if self.needles and dice.random() < self.needles:
            return self._needle(number, profile, dice)
        turns = []
        for place in range(count):
            prompt, answer = self._scaled(dice.randint(*profile.prompt)), self._scaled(dice.randint(*profile.answer))
            think = dice.expovariate(1 / profile.think) if place and profile.think else 0.0
            turns.append(self._turn(number, place, shared if place == 0 else [], prompt, answer, think))
        return self._conversation(number, tuple(turns))

    def request(self, number: int) -> Request:
        """The first request of that conversation."""
        return self.conversation(number).request(0, ())

    def fixed(self, number: int, head: list[Any], prompt: int, answer: int) -> Conversation:
        """One request of `prompt` tokens after those of `head`, answered with exactly `answer`."""
        return self._conversation(number, (self._turn(number, 0, head, prompt, answer),))

    def under_way(self, count: int) -> Iterator[Request]:
        """Requests as they are met at any one time: in the middle, what has been answered of them in their prompts.

        Those with long answers are met more often, and each at another part of its answer, from the first to the last.
        Their numbers are negative.
        """
        answers = [each.answer_tokens for each in self.trace] or [profile.answer[1] for profile in self._profiles]
        longest, dice = self._scaled(max(answers)), random.Random(f"{self.profile}/{self.seed}/under way")
        parts = [(place + dice.random()) / count for place in range(count)]
        dice.shuffle(parts)
        drawn = itertools.count()
        while parts:
            dice = self._dice(next(drawn), "/under way")
            shared, prompt, answer = self._lengths(dice)
            if dice.random() < answer / longest:
                done = int(answer * parts.pop())
                yield self.fixed(len(parts) - count, shared, prompt + done, answer - done).request(0, ())

    def _dice(self, number: int, what: str = "") -> random.Random:
        seed = f"{self.profile}/{self.seed}{what}"
        return Even(seed, number) if self.even else random.Random(f"{seed}/{number}")

    def _lengths(self, dice: random.Random) -> tuple[list[Any], int, int]:
        """What a request's prompt begins with, how long the rest of it is, turns before it included, and its answer."""
        if self.trace:
            each = dice.choice(self.trace)
            return [], self._scaled(each.prompt_tokens), self._scaled(each.answer_tokens)
        profile = dice.choice(self._profiles)
        shared = self._shared(profile, dice)
        turn = dice.randrange(dice.randint(*profile.turns))
        before = sum(dice.randint(*profile.prompt) + dice.randint(*profile.answer) for _ in range(turn))
        prompt = self._scaled(dice.randint(*profile.prompt) + before)
        return shared, prompt, self._scaled(dice.randint(*profile.answer))

    @property
    def around(self) -> int:
        """Tokens that the chat template adds to a prompt."""
        return self.texts.around if self.texts else 0

    @property
    def mean_turns(self) -> float:
        """Requests of a conversation on average."""
        if self.profile == DATASET:
            return sum(len(each.turns) for each in self.dialogues) / max(len(self.dialogues), 1)
        return sum(sum(profile.turns) / 2 for profile in self._profiles) / len(self._profiles)

    @property
    def mean_answer(self) -> float:
        """Tokens of an answer on average."""
        if self.trace:
            return self.scale * sum(each.answer_tokens for each in self.trace) / len(self.trace)
        return self.scale * sum(sum(profile.answer) / 2 for profile in self._profiles) / len(self._profiles)

    @property
    def mean_think(self) -> float:
        """Seconds of thought before a turn on average."""
        return sum(profile.think for profile in self._profiles) / len(self._profiles)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a prompt and its answer on average, of a conversation those of the turns before too."""
        if self.trace:
            return self.scale * sum(each.prompt_tokens + each.answer_tokens for each in self.trace) / len(self.trace)
        found = 0.0
        for each in self._profiles:
            turn = sum(each.prompt) / 2 + sum(each.answer) / 2
            found += each.shared * self.prefix_share + turn * (1 + (sum(each.turns) / 2 - 1) / 2)
        return self.scale * found / len(self._profiles)

    @cached_property
    def _profiles(self) -> list[Profile]:
        names = MIXED if self.profile == "mixed" else ("chat",) if self.profile in (DATASET, TRACE) else (self.profile,)
        found = [PROFILES[name] for name in names]
        if self.turns:
            found = [replace(each, turns=(self.turns, self.turns)) for each in found]
        if self.think >= 0:
            found = [replace(each, think=self.think) for each in found]
        if self.prefix_tokens >= 0:
            found = [replace(each, shared=self.prefix_tokens) for each in found]
        return found

    @property
    def _text_seed(self) -> int:
        return self.seed if self.text_seed is None else self.text_seed

    def _shared(self, profile: Profile, dice: random.Random) -> list[Any]:
        """One of the shared prefixes, which are the same whatever the seed, or for a part of conversations none."""
        if not profile.shared or (self.prefix_share < 1 and dice.random() >= self.prefix_share):
            return []
        which = dice.randrange(self.prefixes) if self.prefixes > 1 else 0
        return self._draw(random.Random(f"shared/{which}"), self._scaled(profile.shared))

    def _turn(self, number: int, place: int, head: list[Any], prompt: int, answer: int, think: float = 0.0) -> Turn:
        """`prompt` tokens after those of `head`."""
        dice = random.Random(f"{self.profile}/{self._text_seed}/{number}/{place}/text")
        tokens = [*head, *self._draw(dice, max(prompt - self.around, 0 if head else 1))]
        stand_in = self._content(self._draw(dice, answer))
        return Turn(self._content(tokens), len(tokens) + self.around, answer, think, stand_in)

    def _needle(self, number: int, profile: Profile, dice: random.Random) -> Conversation:
        prompt, answer = self._scaled(dice.randint(*profile.prompt)), self._scaled(dice.randint(*profile.answer))
        text, expected = needle(prompt, dice, f"{self._text_seed}.{number}", chat=self.api == "chat")
        return self._conversation(number, (Turn(text, prompt, answer, expected=expected),))

    def _dialogue(self, number: int) -> Conversation:
        dice = self._dice(number)
        count = self.texts.count if self.texts and self.texts.count else lambda text: round(len(text.split()) * 4 / 3)
        turns = []
        for place, (said, answered) in enumerate(dice.choice(self.dialogues).turns):
            think = dice.expovariate(1 / self.think) if place and self.think > 0 else 0.0
            turns.append(Turn(said, count(said), self._scaled(max(count(answered), 1)), think, answered))
        return self._conversation(number, tuple(turns[: self.turns or None]))

    def _traced(self, number: int) -> Conversation:
        """The trace's requests in their order, and again with other tokens; what is in no block is the text seed's."""
        lap, place = divmod(number, len(self.trace))
        each = self.trace[place]
        prompt, block = self._scaled(each.prompt_tokens), self._scaled(BLOCK_TOKENS)
        head = list[Any]()
        for name in each.blocks:
            head += self._draw(random.Random(f"block/{self._text_seed}/{lap}/{name}"), block)
        del head[max(prompt - self.around, 0) :]
        return self.fixed(number, head, prompt - len(head), self._scaled(each.answer_tokens))

    def _conversation(self, number: int, turns: tuple[Turn, ...]) -> Conversation:
        name = f"{self.profile}-{self._text_seed}-{number}"
        return Conversation(self.profile, name, self.api, self.model, turns)

    def _content(self, tokens: list[Any]) -> Any:
        """The first word has no space before it, so it is always the one whose tokens were counted."""
        return "".join([WORDS[0], *tokens[1:]]) if self.texts else tokens

    def _draw(self, dice: random.Random, count: int) -> list[Any]:
        if self.texts:
            return [f" {word}" for word in dice.choices(self.texts.words, k=count)]
        return dice.choices(range(FIRST_TOKEN, self.vocab_size), k=count)

    def _scaled(self, tokens: int) -> int:
        return max(1, round(tokens * self.scale)) if tokens else 0
