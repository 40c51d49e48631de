"""Conversations, whose next request follows from the answers before; most have one request."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Api = Literal["completions", "chat"]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
JUDGED = 300
"""Characters of an answer that it is judged by, so that one that is cut off later can be judged too."""


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent."""

    profile: str
    id: str
    path: str
    body: bytes
    prompt_tokens: int
    answer_tokens: int
    expected: str = ""
    """What a right answer has in it, where it is known."""

    def judge(self, text: str, ended: bool) -> bool | None:
        """Whether that answer is right by its first characters, where it is known what would be, and they have come."""
        if not self.expected or (len(text) < JUDGED and not ended):
            return None
        return self.expected in text[:JUDGED]


@dataclass(frozen=True)
class Turn:
    """What a user says, and how long an answer is wanted."""

    content: Any
    """Token ids for completions, or text."""
    tokens: int
    answer_tokens: int
    think: float = 0.0
    """Seconds after the answer before it."""
    stand_in: Any = None
    """In place of an answer that was not asked for, since the conversation is entered after it."""
    expected: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns that build on each other; most have one."""

    profile: str
    id: str
    api: str
    model: str
    turns: tuple[Turn, ...]

    def request(self, turn: int, answers: Sequence[Any]) -> Request:
        """The request of that turn, after `answers` to those before: text, token ids where prompts are such."""
        said, tokens = list[Any](), 0
        for place in range(turn):
            before = self.turns[place]
            said += [before.content, answers[place]]
            tokens += before.tokens + before.answer_tokens
        now = self.turns[turn]
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": now.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        said.append(now.content)
        if self.api == "chat":
            roles = ("user", "assistant")
            body["messages"] = [{"role": roles[place % 2], "content": each} for place, each in enumerate(said)]
        else:
            whole: Any = type(now.content)()
            for each in said:
                whole = whole + each
            body["prompt"] = whole
            if len(self.turns) > 1 and isinstance(whole, list):
                body["return_token_ids"] = True
        name = f"{self.id}.{turn}" if len(self.turns) > 1 else self.id
        return Request(
            self.profile,
            name,
            PATHS[self.api],
            json.dumps(body).encode(),
            tokens + now.tokens,
            now.answer_tokens,
            now.expected,
        )


@dataclass
class History:
    """The answers of a conversation so far."""

    conversation: Conversation
    turn: int = 0
    """Which comes next."""
    answers: list[Any] = field(default_factory=list)

    def request(self) -> Request:
        """The next."""
        return self.conversation.request(self.turn, self.answers)

    def skip(self, turns: int) -> None:
        """Go on as if so many had been answered."""
        while self.turn < turns:
            self.add(self.conversation.turns[self.turn].stand_in)

    def add(self, answer: Any) -> None:
        """Go on after that answer."""
        self.answers.append(answer)
        self.turn += 1

    def add_stream(self, text: str, token_ids: Sequence[int]) -> None:
        """Go on after what was streamed: the very tokens where prompts are such, so that a cache can know them."""
        turn = self.conversation.turns[self.turn]
        if isinstance(turn.content, str):
            self.add(text)
        else:
            self.add(list(token_ids) if len(token_ids) == turn.answer_tokens else turn.stand_in)

    @property
    def over(self) -> bool:
        """Whether nothing is left to ask."""
        return self.turn >= len(self.conversation.turns)
