"""A streaming client for OpenAI-compatible endpoints that notes when lines arrive, and reads them afterwards.

Parsing takes turns from other users of the same process, so it waits until the stream has ended. HTTP is
geventhttpclient's, Locust's own fast client, whose parser is in C: httpx takes several times as long for a chunk.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import gevent.socket
import httpx
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from loadtests.answer import CUT, Answer, now
from loadtests.conversations import Request

CONNECT_SECONDS, READ_SECONDS = 30.0, 600.0
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity", "Accept": "text/event-stream"}
Chunk = tuple[float, bytes]
"""When a line of the stream arrived, and the line."""


def authorization() -> dict[str, str]:
    """The header with the key in OPENAI_API_KEY, if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def open_client(host: str) -> httpx.Client:
    """A client for what is asked once, before a run."""
    return httpx.Client(base_url=host.rstrip("/"), headers=authorization(), timeout=CONNECT_SECONDS, trust_env=False)


class Streams:
    """A server, for up to `most` streams at once."""

    def __init__(self, host: str, most: int) -> None:
        url = httpx.URL(host)
        self.base = url.path.rstrip("/")
        self.http = HTTPClient(
            url.host,
            url.port,
            headers=HEADERS | authorization(),
            connection_timeout=CONNECT_SECONDS,
            network_timeout=READ_SECONDS,
            concurrency=most,
            ssl=url.scheme == "https",
        )

    def ask(self, request: Request, intended: float, chunks: list[Chunk]) -> "tuple[Answer, Stream]":
        """Stream one answer through the empty list `chunks`; what goes wrong is the answer's `error`."""
        sent, error = now(), None
        try:
            error = self._stream(request, chunks)
        except (gevent.socket.timeout, TimeoutError):
            error = "timeout"
        except ConnectionRefusedError:
            error = "connect"
        except (HTTPParseError, OSError):
            error = "dropped"
        end = now()
        stream = Stream.of(chunks)
        if error is None:
            error = stream.error or (None if stream.usage else "no usage")
        return stream.answer(request, intended, sent, end, error), stream

    def _stream(self, request: Request, chunks: list[Chunk]) -> str | None:
        headers = {"X-Request-Id": request.id}
        try:
            response = self.http.request("POST", self.base + request.path, request.body, headers)
        except HTTPConnectionClosed:  # one kept open that the server has closed meanwhile
            response = self.http.request("POST", self.base + request.path, request.body, headers)
        if response.status_code != 200:
            response.read()
            return f"HTTP {response.status_code}"
        while line := response.readline(b"\n"):
            chunks.append((now(), line))
        return None


@dataclass(frozen=True)
class Stream:
    """What the lines of a stream say."""

    times: tuple[float, ...]
    """When each chunk with tokens arrived."""
    counts: tuple[int, ...]
    """Tokens of each, where the server counts as it goes (`continuous_usage_stats`); else empty."""
    usage: dict[str, Any]
    size: int
    text: str
    token_ids: tuple[int, ...]
    """Of the answer, where the server gives them (vLLM's `return_token_ids`)."""
    error: str | None

    @classmethod
    def of(cls, chunks: list[Chunk]) -> "Stream":
        """Read them."""
        times, counts, texts, token_ids = list[float](), list[int](), list[str](), list[int]()
        usage: dict[str, Any] = {}
        error: str | None = "dropped"
        for time, line in chunks:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                error = None
                break
            try:
                event = json.loads(data)
            except ValueError:
                break
            if event.get("error"):
                error = "error event"
                break
            before = usage.get("completion_tokens", 0)
            usage = event.get("usage") or usage
            choices = event.get("choices") or []
            if any(_has_tokens(choice) for choice in choices):
                times.append(time)
                counts.append(usage.get("completion_tokens", 0) - before)
                texts += [_text(choice) or "" for choice in choices]
                token_ids += [one for choice in choices for one in choice.get("token_ids") or ()]
        known = counts if all(count > 0 for count in counts) else []
        size = sum(len(line) for _, line in chunks)
        return cls(tuple(times), tuple(known), usage, size, "".join(texts), tuple(token_ids), error)

    def answer(self, request: Request, intended: float, sent: float, end: float, error: str | None) -> Answer:
        """The answer it makes; of one cut off, tokens are what was asked and what came, a chunk's at least one."""
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        came = sum(self.counts) or len(self.times)
        return Answer(
            request.profile,
            request.id,
            intended,
            sent,
            end,
            self.times,
            self.usage.get("prompt_tokens", request.prompt_tokens if self.times else 0),
            self.usage.get("completion_tokens", came),
            request.answer_tokens,
            self.size,
            error,
            self.counts,
            cached,
            request.judge(self.text, error is None),
        )


def cut_off(request: Request, intended: float, chunks: list[Chunk], error: str = CUT) -> Answer:
    """What came of a request that is not waited for any longer."""
    return Stream.of(chunks).answer(request, intended, intended, now(), error)


def _text(choice: dict[str, Any]) -> str | None:
    delta = choice.get("delta")
    return choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Not so the announcement of a role, and an empty last chunk; a token may well be half a character, and no text."""
    delta = choice.get("delta") or {}
    if _text(choice) or delta.get("tool_calls"):
        return True
    return choice.get("finish_reason") is None and "role" not in delta
