"""What a model is asked while its layers are changed: tasks that retrieve, tasks that compute, and prose.

*Attend First, Consolidate Later* (arXiv 2409.03621) uses capitals, arithmetic, SQuAD and CNN/DailyMail. The last two
are in no package, so the bundled tasks have stand-ins for them, reasoning-gym's needles in haystacks and ACLSum's
papers; `--data` takes the paper's own files, or anyone's.

Every item is a prompt with worked examples and what is to follow. An answer is right if each of its tokens, and the end
of the line after it, is the model's first choice: that is what greedy decoding would write, found in one pass.
"""

import random
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

from vllm_ext.errors import UsageError
from vllm_ext.tasks import texts
from vllm_ext.tasks.items import Item, Split, Task, item
from vllm_ext.tasks.passages import all_passages

Name = Literal["capitals", "sums", "reading", "prose", "summaries"]
NAMES: tuple[Name, ...] = get_args(Name)

SHOTS = {"capitals": 4, "sums": 4, "reading": 2}
PROSE_TOKENS = 512
"""Of a passage; of the last quarter the tokens are scored, as if generated after the rest."""
DOCUMENT_TOKENS = 320
"""Of a document to sum up."""
SUMMARY_TOKENS = 48
STATEMENTS = 5
"""In a passage to read."""


def bundled(name: Name, tokenizer: Any, count: int, seed: int = 0, split: Split = "judge") -> Task:
    """A task out of packages, of `count` items or as many as there are; those of the two splits are different.

    Raises:
        UsageError: where a package is missing.

    """
    make: Callable[..., Task] = {
        "capitals": _capitals,
        "sums": _sums,
        "reading": _reading,
        "prose": _prose,
        "summaries": _summaries,
    }[name]
    return make(tokenizer, count, random.Random(seed), split)


def _capitals(tokenizer: Any, count: int, chosen: random.Random, split: Split) -> Task:
    known = [(texts.capital_question(country), f" {city}\n") for country, city in texts.capitals().items()]
    return _with_examples(
        "capitals", tokenizer, _half(known, split), count, chosen, "", f"countryinfo {version('countryinfo')}"
    )


def _sums(tokenizer: Any, count: int, chosen: random.Random, split: Split) -> Task:
    known = [(f"{a} + {b} =", f" {a + b}, ") for a, b in _half(texts.sums(0, 4_000), split)]
    return _with_examples(
        "sums", tokenizer, chosen.sample(known, count + SHOTS["sums"]), count, chosen, "", "two-digit sums"
    )


def _reading(tokenizer: Any, count: int, chosen: random.Random, split: Split) -> Task:
    try:
        import reasoning_gym
    except ImportError:
        raise texts.missing("reasoning-gym") from None
    made = reasoning_gym.create_dataset(
        "needle_haystack",
        size=count + SHOTS["reading"],
        seed=chosen.randrange(2**20) + (2**24 if split == "judge" else 0),  # items have seeds from there on
        min_num_statements=STATEMENTS,
        max_num_statements=STATEMENTS,
    )
    known = []
    for each in made:
        passage, question = each["question"].strip().rsplit("\n", 1)
        question = question.split("?")[0].strip()
        known.append((f"{passage.strip()}\nQ: {question}?\nA:", f" {each['answer']}\n"))
    source = f"reasoning-gym {version('reasoning-gym')}: needle_haystack"
    return _with_examples("reading", tokenizer, known, count, chosen, "\n", source)


def _prose(tokenizer: Any, count: int, chosen: random.Random, split: Split) -> Task:
    articles = texts.prose("held_out" if split == "judge" else "calibration")
    return passages("prose", tokenizer, articles, count, chosen, texts.prose_source())


def _summaries(tokenizer: Any, count: int, chosen: random.Random, split: Split) -> Task:
    try:
        from aclsum import ACLSum
    except ImportError:
        raise texts.missing("aclsum") from None
    known = list(
        zip(*ACLSum("test" if split == "judge" else "train").to_parallel_corpus("approach", False), strict=True)
    )
    source = f"aclsum {version('aclsum')}: approach"
    return summing_up("summaries", tokenizer, chosen.sample(known, len(known)), count, source)


def _half(known: Sequence[Any], split: Split) -> list[Any]:
    """A third to search with, and the rest to judge on."""
    mixed = random.Random(0).sample(known, len(known))
    return mixed[len(known) // 3 :] if split == "judge" else mixed[: len(known) // 3]


def _with_examples(
    name: str,
    tokenizer: Any,
    known: Sequence[tuple[str, str]],
    count: int,
    chosen: random.Random,
    between: str,
    source: str,
) -> Task:
    """Each of `known` once, after worked examples from the others."""
    items = []
    for asked in chosen.sample(known, min(count, len(known))):
        examples = chosen.sample([each for each in known if each != asked], SHOTS[name])
        shown = "".join(question + answer + between for question, answer in examples)
        # What ends an answer is part of it, but for a space that the next word takes with it.
        items.append(item(tokenizer, shown + asked[0], asked[1].rstrip(" ")))
    return Task(name, "answers", tuple(items), (), source)


def passages(
    name: str, tokenizer: Any, documents: Sequence[str], count: int, chosen: random.Random, source: str
) -> Task:
    """Passages of one length from anywhere in the documents, which do not overlap."""
    found = all_passages(tokenizer, documents, PROSE_TOKENS)
    if not found:
        raise UsageError(f"{source}: no text is as long as {PROSE_TOKENS} tokens; give longer ones")
    cut = PROSE_TOKENS - PROSE_TOKENS // 4
    passages = chosen.sample(found, min(count, len(found)))
    return Task(name, "tokens", tuple(Item(tuple(each[:cut]), tuple(each[cut:])) for each in passages), (), source)


def summing_up(name: str, tokenizer: Any, known: Sequence[tuple[str, str]], count: int, source: str) -> Task:
    """Prompts of one length: the beginnings of documents that are long enough."""
    start = tokenizer("").input_ids
    asking = tokenizer("\n\nIn one sentence, this text says that", add_special_tokens=False).input_ids
    items: list[Item] = []
    references: list[str] = []
    for document, summary in known:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= DOCUMENT_TOKENS and len(items) < count:
            items.append(Item((*start, *ids[:DOCUMENT_TOKENS], *asking), ()))
            references.append(summary)
    if not items:
        raise UsageError(f"{source}: no document is as long as {DOCUMENT_TOKENS} tokens; give longer ones")
    return Task(name, "summaries", tuple(items), tuple(references), source)
