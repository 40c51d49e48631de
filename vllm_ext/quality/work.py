"""What every model is given: held-out passages, texts to retrieve from, and questions after worked examples."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_ext.errors import UsageError
from vllm_ext.reports.figures import Scored
from vllm_ext.served import Served
from vllm_ext.tasks import retrieval, texts
from vllm_ext.tasks.items import Task
from vllm_ext.tasks.passages import all_passages

ANSWER_TOKENS = 128
SHOTS = 4
# What stands between examples. In a row, the embedded model gets twice as many sums right as in lines.
BETWEEN = {"capitals": "\n", "sums": ", "}
MAX_TOKENS = {"capitals": 16, "sums": 8}


@dataclass(frozen=True)
class QualitySettings:
    """How much is measured.

    Raises:
        UsageError: for sizes with which nothing could be measured.

    """

    lengths: tuple[int, ...] = (512, 2048)
    """Tokens of a passage."""
    tokens: int = 32_768
    """Held-out tokens for each length."""
    items: int = 100
    """Capitals, and sums."""
    seed: int = 0
    tasks: tuple[retrieval.Name, ...] = ("needle", "needles")
    """Those that retrieve."""
    task_lengths: tuple[int, ...] = (512, 1_024)
    """Tokens of their items: each is asked at every length."""
    task_items: int = 20
    """Of each, at each length."""

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < 8:
                raise UsageError(f"--length {length}: too short to measure; take 8 tokens or more")
            if self.tokens < length:
                raise UsageError(f"--tokens {self.tokens}: less than one passage of {length}; raise it to {length}")
        for task in self.tasks:
            if task not in retrieval.NAMES:
                raise UsageError(f"--task {task}: there is none of that name; take {', '.join(retrieval.NAMES)}")
        for length in self.task_lengths:
            if length < retrieval.SHORTEST:
                raise UsageError(
                    f"--task-length {length}: too short to hide anything in; take {retrieval.SHORTEST} tokens or more"
                )
        given = {"--length": self.lengths, "--task": self.tasks, "--task-length": self.task_lengths}
        for option, values in given.items():
            for value in values:
                if values.count(value) > 1:
                    raise UsageError(f"{option} {value}: named twice; name each once")
        for option, number in (("--items", self.items), ("--task-items", self.task_items)):
            if not 1 <= number <= 1_000:
                raise UsageError(f"{option} {number}: choose 1 to 1000")


@dataclass(frozen=True)
class Work:
    """What every model is given, in token ids."""

    passages: dict[int, list[list[int]]]
    """Held-out prose by the length of its passages."""
    prompts: dict[str, list[list[int]]]
    """Prompts with worked examples, by task."""
    retrieved: tuple[Task, ...] = ()
    """Prompts with the answers that lie in them."""

    @staticmethod
    def answer_tokens(length: int) -> int:
        """How many tokens at the end of a passage are scored as if they were generated."""
        return min(ANSWER_TOKENS, length // 4)

    @property
    def max_model_len(self) -> int:
        """The longest prompt with its answer, in tokens."""
        prompts = (len(prompt) + MAX_TOKENS[task] for task, prompts in self.prompts.items() for prompt in prompts)
        retrieved = (len(each.prompt) + len(each.answer) for task in self.retrieved for each in task.items)
        return max(*prompts, *retrieved, max(self.passages) + 1)

    @property
    def tokens(self) -> int:
        """All tokens of all prompts."""
        passages = sum(len(each) * (2 * n - self.answer_tokens(n)) for n, each in self.passages.items())
        retrieved = sum(len(each.prompt) for task in self.retrieved for each in task.items)
        return passages + retrieved + sum(len(prompt) for prompts in self.prompts.values() for prompt in prompts)


@dataclass(frozen=True)
class Asked:
    """What an engine's process is to do."""

    served: Served
    vllm_args: Sequence[str]
    work: Work

    @property
    def with_prompts(self) -> bool:
        """Whether the model can say anything of prompt tokens: frozen layers give those no logits."""
        plan = self.served.plan
        return plan is None or plan.first_frozen == len(plan.layers)


@dataclass
class Replies:
    """What a model made of the work."""

    prompts: dict[int, list[Scored]] = field(default_factory=dict)
    """Passages as prompts; none of a model that cannot say anything of prompt tokens."""
    answers: dict[int, list[Scored]] = field(default_factory=dict)
    """The ends of passages as answers to the rest."""
    generated: dict[str, list[list[int]]] = field(default_factory=dict)
    retrieved: dict[str, list[Scored]] = field(default_factory=dict)
    """The right answers to what is to be retrieved, scored as if they were generated, by task."""


def prepare_work(tokenizer: Any, settings: QualitySettings) -> tuple[Work, dict[str, list[str]]]:
    """The work in the model's tokens, and the right answers of each task.

    Raises:
        UsageError: where the texts are not installed, or too short.

    """
    prose = texts.prose("held_out")
    passages = {length: _passages(tokenizer, prose, length, settings) for length in settings.lengths}
    questions = {
        "capitals": [(texts.capital_question(country), capital) for country, capital in texts.capitals().items()],
        "sums": [(f"{a} + {b} =", str(a + b)) for a, b in texts.sums(settings.seed, 2 * settings.items + SHOTS)],
    }
    chosen = random.Random(settings.seed)
    prompts: dict[str, list[list[int]]] = {}
    right: dict[str, list[str]] = {}
    for task, known in questions.items():
        asked = chosen.sample(known, min(settings.items, len(known)))
        right[task] = [answer for _, answer in asked]
        for question, _ in asked:
            examples = chosen.sample([each for each in known if each[0] != question], SHOTS)
            lines = [*(f"{each} {answer}" for each, answer in examples), question]
            prompts.setdefault(task, []).append(tokenizer(BETWEEN[task].join(lines)).input_ids)
    retrieved = tuple(
        retrieval.retrieval(name, tokenizer, length, settings.task_items, settings.seed)
        for name in settings.tasks
        for length in settings.task_lengths
    )
    return Work(passages, prompts, retrieved), right


def _passages(tokenizer: Any, prose: list[str], length: int, settings: QualitySettings) -> list[list[int]]:
    """Passages from anywhere in the prose that do not overlap."""
    found = all_passages(tokenizer, prose, length)
    if not found:
        raise UsageError(f"--length {length}: no held-out text is so long; choose a shorter one")
    wanted = settings.tokens // length
    return random.Random(settings.seed).sample(found, min(wanted, len(found)))
