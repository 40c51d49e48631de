"""What a request may ask for: the bytes of its body, `n`, output tokens and prompt tokens, before vLLM sees it.

The same rules hold on every route, since all of them name these things alike. A body is read ahead only where a limit
asks for what is in it, or where nothing states its length.
"""

import json
import math
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import Reason, Refused
from serving.grammars import check_grammar
from serving.request import Body, path_of, too_large
from serving.schemas import check_schemas
from serving.settings import ServerSettings

OUTPUT_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
METHODS = ("POST", "PUT", "PATCH")
TOKENIZERS = ("/tokenize", "/detokenize")
CountTokens = Callable[[dict[str, Any]], Awaitable[int]]
"""Counts the tokens of what /tokenize takes."""


class Limits:
    """Refuses what is over a limit; `count` counts a prompt's tokens for the request of a scope."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, count: Callable[[Scope, dict[str, Any]], Awaitable[int]]
    ) -> None:
        self.app, self.settings, self.count = app, settings, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        headers, limit = Headers(scope=scope), self.settings.max_body_bytes
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large(limit)
        # Of what is no JSON, as a file that is handed up, no limit asks anything.
        asked = self.settings.of_content and scope["method"] in METHODS
        asked = asked and not headers.get("content-type", "").startswith("multipart/")
        if asked or "transfer-encoding" in headers:
            receive = Body(receive)
            content = await receive.read(limit)
            if asked and content:
                await self._check(scope, content)
        await self.app(scope, receive, send)

    async def _check(self, scope: Scope, content: bytes) -> None:
        body = parse(content)
        check(body, self.settings)
        check_schemas(body)
        check_grammar(body)
        limit = self.settings.max_prompt_tokens
        if limit is not None and path_of(scope) not in TOKENIZERS:
            await check_prompt(body, limit, partial(self.count, scope))


def parse(content: bytes) -> Any:
    """The body as JSON, exactly as the routes will read it; None where it is none, which they refuse themselves.

    Raises:
        Refused: for JSON that is nested too deeply to be read.

    """
    try:
        return json.loads(content)
    except ValueError:
        return None
    except RecursionError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "body", "the body is nested too deeply") from error


def check(body: Any, settings: ServerSettings) -> None:
    """Raise Refused where the body asks for more choices or tokens than `settings` allow."""
    if not isinstance(body, dict):
        return
    for part in (body, body.get("sampling_params")):
        if not isinstance(part, dict):
            continue
        for names, limit, option in (
            (("n", "best_of"), settings.max_n, "--max-n"),
            (OUTPUT_TOKENS, settings.max_output_tokens, "--max-output-tokens"),
        ):
            for name in names:
                asked = _number(part.get(name))
                if limit is not None and asked > limit:
                    reason: Reason = "n" if name in ("n", "best_of") else "output_tokens"
                    message = f"{name} is {part[name]}, and this server allows at most {limit} ({option})"
                    raise Refused(HTTPStatus.BAD_REQUEST, reason, message, name)


def _number(value: Any) -> float:
    """As pydantic reads it, from text too; minus infinity where it is no number, which the routes refuse."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return -math.inf


async def check_prompt(body: Any, limit: int, count: CountTokens) -> None:
    """Raise Refused where a prompt in the body has more than `limit` tokens."""
    for prompt in prompts(body):
        tokens = len(prompt) if isinstance(prompt, list) else await count(prompt)
        if tokens > limit:
            message = f"the prompt has {tokens} tokens, and this server allows at most {limit} (--max-prompt-tokens)"
            raise Refused(HTTPStatus.BAD_REQUEST, "prompt_tokens", message, "prompt")


def prompts(body: Any) -> Iterator[list[int] | dict[str, Any]]:
    """The prompts in a body, of whatever route: token ids, or a request to /tokenize."""
    if not isinstance(body, dict):
        return
    chat = {name: body[name] for name in ("tools", "chat_template_kwargs", "add_special_tokens") if body.get(name)}
    if isinstance(ids := body.get("token_ids"), list):
        yield ids
    if (prompt := body.get("prompt")) is not None:
        several = isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int))
        for each in prompt if several else [prompt]:
            yield each if isinstance(each, list) else {"prompt": each}
    if isinstance(messages := body.get("messages"), list):
        batch = messages and isinstance(messages[0], list)
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        for each in messages if batch else [messages]:
            yield {"messages": [*system, *each], **chat}
    if (given := body.get("input")) is not None:
        start = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
        yield {"messages": [*start, *_responses_messages(given)]}


def _responses_messages(given: Any) -> list[dict[str, Any]]:
    """The `input` of /v1/responses as messages; items that are none count as text."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = []
    for item in given if isinstance(given, list) else [given]:
        content = item.get("content") if isinstance(item, dict) else None
        if isinstance(content, list):
            content = "".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
        role = item.get("role", "user") if isinstance(item, dict) else "user"
        messages.append({"role": role, "content": content if isinstance(content, str) else json.dumps(item)})
    return messages
