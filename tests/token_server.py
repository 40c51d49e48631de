"""An OpenAI-compatible server that emits tokens at known times, and says when it really sent each.

`python -m tests.token_server PORT [--slots N] [--first S] [--gap S]`. What it does with a request is said by its
model, one of `MODELS`; /sent has the times (Unix seconds on the monotonic clock) of all answers, and what was asked.
It has a prefix cache too, which only counts: blocks of 16 tokens, each known by all before it.
"""

import argparse
import asyncio
import json
import random
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

MODELS = ("constant", "jittered", "bursts", "unsteady", "stalls", "errors", "drops", "event", "nousage")
EPOCH = time.time() - time.perf_counter()
BLOCK = 16
TOKEN = 7
"""The id of each token that it answers with."""


class TokenServer:
    """`slots` requests are answered at once, first come first served; the others wait."""

    def __init__(self, slots: int, first: float, gap: float, tokens: int | None) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.first, self.gap, self.tokens = first, gap, tokens
        self.sent: list[dict] = []
        self.running = self.waiting = self.served = self.queried = self.hit = 0
        self.blocks: set[int] = set()

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if body["model"] == "errors":
            return JSONResponse({"error": {"message": "no"}}, 503)
        return StreamingResponse(self.answer(body, request.headers.get("x-request-id")), media_type="text/event-stream")

    async def answer(self, body: dict, name: str):
        model, tokens, times = body["model"], self.tokens or body.get("max_tokens") or body["max_completion_tokens"], []
        counts: list[int] = []
        said = body.get("prompt") or [word for each in body["messages"] for word in text_of(each).split()]
        prompt = len(said) + 5 * ("messages" in body)
        arrived, cached = EPOCH + time.perf_counter(), self.look_up(said)
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        started = EPOCH + time.perf_counter()
        try:
            due, done = time.perf_counter() + self.first, 0
            for count, wait in self.steps(model, tokens):
                due += wait if done else 0
                await asyncio.sleep(max(0, due - time.perf_counter()))
                times.append(EPOCH + time.perf_counter())
                if model == "event":
                    yield 'data: {"error": {"message": "no"}}\n\n'
                    return
                done += count
                counts.append(count)
                yield self.event(body, count, {"prompt_tokens": prompt, "completion_tokens": done})
                if model == "drops" and done >= tokens // 2:
                    raise ConnectionAbortedError
        finally:
            self.running -= 1
            self.slots.release()
            ended = EPOCH + time.perf_counter()
            self.served += 1
        if isinstance(said, list):
            self.look_up([*said, *[TOKEN] * tokens], count=False)
        asked = {
            "arrived": arrived,
            "prompt": body.get("prompt") or body["messages"],
            "cached": cached,
            "counts": counts,
        }
        self.sent.append({"id": name, "busy": ended - started, "times": times, "tokens": tokens} | asked)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if model != "nousage":
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    def event(self, body: dict, count: int, usage: dict) -> str:
        choice: dict = {"index": 0, "finish_reason": None}
        text = " token" * count
        choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
        if body.get("return_token_ids"):
            choice["token_ids"] = [TOKEN] * count
        event: dict = {"choices": [choice]}
        if body["stream_options"].get("continuous_usage_stats") and body["model"] != "nousage":
            event["usage"] = usage
        return f"data: {json.dumps(event)}\n\n"

    def look_up(self, said: list, count: bool = True) -> int:
        """Tokens found in the cache, which has them all from now on."""
        found, key, hits = True, 0, 0
        for start in range(0, len(said) - BLOCK + 1, BLOCK):
            key = hash((key, tuple(said[start : start + BLOCK])))
            found = found and key in self.blocks
            hits += found * BLOCK
            self.blocks.add(key)
        if count:
            self.queried += len(said)
            self.hit += hits
        return hits

    def steps(self, model: str, tokens: int):
        """Tokens of each chunk, and seconds since the one before."""
        dice = random.Random(tokens)
        done = 0
        while done < tokens:
            count = min(4, tokens - done) if model == "bursts" else 1
            if model == "unsteady":
                count = min(dice.choice((1, 2, 5)), tokens - done)
            wait = self.gap * count
            if model == "jittered":
                wait *= dice.uniform(0.2, 1.8)
            if model == "stalls" and done == tokens // 2:
                wait += 0.5
            yield count, wait
            done += count

    async def metrics(self, _: Request) -> Response:
        rows = {"num_requests_running": self.running, "num_requests_waiting": self.waiting,
                "kv_cache_usage_perc": min(1, self.running / 64)}  # fmt: skip
        counters = {"prefix_cache_queries": self.queried, "prefix_cache_hits": self.hit}
        lines = [f'# TYPE vllm:{name} gauge\nvllm:{name}{{engine="0"}} {value}\n' for name, value in rows.items()]
        lines += [
            f'# TYPE vllm:{name} counter\nvllm:{name}_total{{engine="0"}} {value}\n' for name, value in counters.items()
        ]
        return PlainTextResponse("".join(lines))

    async def tokenize(self, request: Request) -> Response:
        """A word is a token; of the chat template there are 5."""
        body = await request.json()
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        return JSONResponse({"count": len(text.split()) + 5 * ("messages" in body)})


def text_of(message: dict) -> str:
    """Its content may be a text or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def app(server: TokenServer) -> Starlette:
    models = {"data": [{"id": model} for model in MODELS]}
    return Starlette(
        routes=[
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/v1/chat/completions", server.complete, methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse(models)),
            Route("/health", lambda _: Response()),
            Route("/version", lambda _: JSONResponse({"version": "token server"})),
            Route("/tokenize", server.tokenize, methods=["POST"]),
            Route("/metrics", server.metrics),
            Route("/sent", lambda _: JSONResponse(server.sent)),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--first", type=float, default=0.05)
    parser.add_argument("--gap", type=float, default=0.02)
    parser.add_argument("--tokens", type=int, help="Of every answer, whatever is asked for.")
    args = parser.parse_args()
    uvicorn.run(app(TokenServer(args.slots, args.first, args.gap, args.tokens)), port=args.port, log_level="critical")
