"""A streaming client for OpenAI-compatible endpoints that notes when chunks arrive, and reads them afterwards.

Parsing takes turns from other users of the same process, so it waits until the stream has ended.
"""

import itertools
import json
from collections.abc import Iterator

import httpx

from loadtests.answer import CUT, Answer, now
from loadtests.workloads import Request

TIMEOUT = httpx.Timeout(30.0, read=600.0)
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


def open_client(host: str, api_key: str | None = None) -> httpx.Client:
    """A client for any number of requests at once."""
    headers = HEADERS | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.Client(base_url=host.rstrip("/"), headers=headers, timeout=TIMEOUT, limits=limits, trust_env=False)


Chunk = tuple[float, bytes]
"""When it arrived, and what."""


def ask(client: httpx.Client, request: Request, intended: float, chunks: list[Chunk]) -> Answer:
    """Stream one answer through the empty list `chunks`; what goes wrong is its `error`."""
    sent, error = now(), None
    try:
        with client.stream(
            "POST", request.path, content=request.body, headers={"X-Request-Id": request.id}
        ) as response:
            if response.status_code == 200:
                for chunk in response.iter_raw():
                    chunks.append((now(), chunk))
            else:
                response.read()
                error = f"HTTP {response.status_code}"
    except httpx.TimeoutException:
        error = "timeout"
    except httpx.ConnectError:
        error = "connect"
    except httpx.TransportError:
        error = "dropped"
    end = now()
    times, usage, closed = _read(chunks)
    if error is None:
        error = closed or (None if usage else "no usage")
    return Answer(
        request.profile,
        request.id,
        intended,
        sent,
        end,
        times,
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
        request.answer_tokens,
        sum(len(chunk) for _, chunk in chunks),
        error,
    )


def cut_off(request: Request, intended: float, chunks: list[Chunk], error: str = CUT) -> Answer:
    """What came of a request that is not waited for any longer."""
    times, _, _ = _read(chunks)
    tokens = request.prompt_tokens, len(times), request.answer_tokens
    return Answer(request.profile, request.id, intended, intended, now(), times, *tokens, error=error)


def events(chunks: list[Chunk]) -> Iterator[Chunk]:
    """The server-sent events' data, each with the time at which its last byte arrived."""
    data = b"".join(chunk for _, chunk in chunks)
    ends = list(itertools.accumulate(len(chunk) for _, chunk in chunks))
    place, start = 0, 0
    while (newline := data.find(b"\n", start)) >= 0:
        line = data[start:newline].rstrip(b"\r")
        while ends[place] <= newline:
            place += 1
        if line.startswith(b"data:"):
            yield chunks[place][0], line[5:].strip()
        start = newline + 1


def _read(chunks: list[Chunk]) -> tuple[tuple[float, ...], dict[str, int], str | None]:
    """When tokens came, the usage, and what was wrong with the stream."""
    times: list[float] = []
    usage: dict[str, int] = {}
    for time, data in events(chunks):
        if data == b"[DONE]":
            return tuple(times), usage, None
        try:
            event = json.loads(data)
        except ValueError:
            return tuple(times), usage, "dropped"
        if event.get("error"):
            return tuple(times), usage, "error event"
        usage = event.get("usage") or usage
        if any(_has_tokens(choice) for choice in event.get("choices") or []):
            times.append(time)
    return tuple(times), usage, "dropped"


def _has_tokens(choice: dict) -> bool:
    """Not so the announcement of a role, and an empty last chunk; a token may well be half a character, and no text."""
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")
    if text or (delta or {}).get("tool_calls"):
        return True
    return choice.get("finish_reason") is None and "role" not in (delta or {})
