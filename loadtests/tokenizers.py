"""How many tokens a prompt has: asked of the server, or of a tokenizer on disk."""

from collections.abc import Callable
from typing import Any

import httpx

from loadtests.texts import Texts, single_token_words


def find_texts(client: httpx.Client, model: str, api: str, tokenizer: str = "") -> Texts:
    """What prompts of exact lengths are made of; where nobody counts tokens, words, approximately.

    Raises:
        ValueError: where too few words are one token each.

    """
    if tokenizer:
        return single_token_words(_local(tokenizer, api))

    def count(text: str) -> int:
        asked = {"messages": [{"role": "user", "content": text}]} if api == "chat" else {"prompt": text}
        answer = client.post("/tokenize", json={"model": model, **asked})
        return int(answer.raise_for_status().json()["count"])

    try:
        return single_token_words(count)
    except (httpx.HTTPStatusError, KeyError):
        return Texts()


def _local(folder: str, api: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def count(text: str) -> int:
        if api != "chat":
            return len(tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    return count
