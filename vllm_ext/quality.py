"""`vllm-ext quality`: what a plan costs, measured beside the stock model on prose, capitals and sums.

Perplexity alone misleads: *Attend First, Consolidate Later* (arXiv 2409.03621) finds that lower layers gather and upper
ones do not, and a plan that leaves out the wrong ones hardly changes perplexity but loses the tasks that retrieve from
the prompt. So both are measured, in the real engine, one model after another, each in a process of its own that gives
its memory back when it ends.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from model_executors.attention_plan import LayerPlan
from model_executors.head_plan import Kind as HeadKind
from vllm_ext import texts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.figures import Figure, Scored, accuracy, agreement, is_right, perplexity
from vllm_ext.process import LOG_LINES, STOP_SECONDS
from vllm_ext.serve import one_line, prepare
from vllm_ext.versions import vllm_distribution

STOCK = "stock"
ANSWER_TOKENS = 128
SHOTS = 4
# What stands between examples. In a row, the embedded model gets twice as many sums right as in lines.
BETWEEN = {"capitals": "\n", "sums": ", "}
MAX_TOKENS = {"capitals": 16, "sums": 8}


@dataclass(frozen=True)
class Candidate:
    """A model to measure."""

    name: str
    model: str
    changes: Mapping[int, LayerPlan] | None = None
    """A plan laid over it; None for the checkpoint as it is."""
    head: HeadKind | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Settings:
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

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < 8:
                raise UsageError(f"--length {length}: too short to measure; take 8 tokens or more")
            if self.tokens < length:
                raise UsageError(f"--tokens {self.tokens}: less than one passage of {length}; raise it to {length}")
            if self.lengths.count(length) > 1:
                raise UsageError(f"--length {length}: named twice; name each length once")
        if not 1 <= self.items <= 1_000:
            raise UsageError(f"--items {self.items}: choose 1 to 1000")


@dataclass(frozen=True)
class Work:
    """What every model is given, in token ids."""

    passages: dict[int, list[list[int]]]
    """Held-out prose by the length of its passages."""
    prompts: dict[str, list[list[int]]]
    """Prompts with worked examples, by task."""

    @staticmethod
    def answer_tokens(length: int) -> int:
        """How many tokens at the end of a passage are scored as if they were generated."""
        return min(ANSWER_TOKENS, length // 4)

    @property
    def max_model_len(self) -> int:
        """The longest prompt with its answer, in tokens."""
        prompts = (len(prompt) + MAX_TOKENS[task] for task, prompts in self.prompts.items() for prompt in prompts)
        return max(*prompts, max(self.passages) + 1)

    @property
    def tokens(self) -> int:
        """All tokens of all prompts."""
        passages = sum(len(each) * (2 * n - self.answer_tokens(n)) for n, each in self.passages.items())
        return passages + sum(len(prompt) for prompts in self.prompts.values() for prompt in prompts)


@dataclass
class Replies:
    """What a model made of the work."""

    prompts: dict[int, list[Scored]] = field(default_factory=dict)
    """Passages as prompts; none of a model that cannot say anything of prompt tokens."""
    answers: dict[int, list[Scored]] = field(default_factory=dict)
    """The ends of passages as answers to the rest."""
    generated: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why an engine gave no replies."""

    reason: str
    with_log: bool


@dataclass(frozen=True)
class Figures:
    """All figures of one model; those of passages by their length."""

    perplexity: dict[int, Figure]
    """Of passages as prompts. Empty for a model with frozen layers, whose prompt tokens get no logits."""
    agreement: dict[int, Figure]
    """How often the top token is the stock model's, in the same places."""
    answer_perplexity: dict[int, Figure]
    """Of the ends of passages, scored as if they were generated."""
    answer_agreement: dict[int, Figure]
    capitals: Figure
    """How many are right."""
    sums: Figure


def quality(
    model: str,
    candidates: Sequence[Candidate],
    settings: Settings,
    vllm_args: Sequence[str] = (),
    json_file: Path | None = None,
) -> None:
    """Measure and print the table.

    Raises:
        UsageError: as `measure` does.

    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"--json {json_file}: no such folder; create {json_file.parent}")
    figures = measure(model, candidates, settings, vllm_args)
    report = {
        "model": Path(model).name,
        "vllm_args": list(vllm_args),
        "settings": asdict(settings),
        "prose": texts.prose_source(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "vllm": " ".join(vllm_distribution() or ("none",)),
        "figures": {name: asdict(each) for name, each in figures.items()},
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    _print(report, figures)


def measure(
    model: str, candidates: Sequence[Candidate], settings: Settings, vllm_args: Sequence[str] = ()
) -> dict[str, Figures]:
    """The figures of the stock `model`, under the name `stock`, and of each candidate.

    Raises:
        UsageError: for a model or a plan that does not fit, or an engine that does not start.

    """
    stock = Candidate(STOCK, model)
    prepared = {
        each.name: prepare(each.model, each.changes, vllm_args, each.head, each.agreement)
        for each in (stock, *candidates)
    }
    if len(prepared) <= len(candidates):
        raise UsageError(f"two of {', '.join(each.name for each in candidates)} have the same name; rename a folder")
    checkpoint, _ = prepared[STOCK]
    _check(checkpoint, [prepared[each.name][0] for each in candidates], settings)
    tokenizer = _tokenizer(model)
    work, right = prepare_work(tokenizer, settings)
    replies: dict[str, Replies] = {}
    with _progress() as progress:
        task = progress.add_task("", total=work.tokens * len(prepared))
        for number, candidate in enumerate((stock, *candidates)):
            progress.update(task, description=f"{candidate.name} ({number + 1} of {len(prepared)})")
            opened, overrides = prepared[candidate.name]
            plan = opened.plan if candidate.changes is None else opened.planned(candidate.changes)
            frozen = plan is not None and plan.first_frozen < len(plan.layers)
            arguments = [*_engine_arguments(candidate.model, work), *vllm_args]
            replies[candidate.name] = _reply(
                arguments, overrides, work, not frozen, lambda tokens: progress.advance(task, tokens)
            )
            progress.update(task, completed=work.tokens * (number + 1))
    scores = {
        name: {
            task: [
                float(is_right(task, tokenizer.decode(answer, skip_special_tokens=True), wanted))
                for answer, wanted in zip(answers, right[task], strict=True)
            ]
            for task, answers in each.generated.items()
        }
        for name, each in replies.items()
    }
    return {
        name: _figures(each, replies[STOCK], scores[name], scores[STOCK], settings.seed, name == STOCK)
        for name, each in replies.items()
    }


def prepare_work(tokenizer: Any, settings: Settings) -> tuple[Work, dict[str, list[str]]]:
    """The work in the model's tokens, and the right answers of each task.

    Raises:
        UsageError: where the texts are not installed, or too short.

    """
    start = tokenizer("").input_ids  # what the model wants before every text
    documents = [tokenizer(text, add_special_tokens=False).input_ids for text in texts.prose("held_out")]
    passages = {length: _passages(documents, start, length, settings) for length in settings.lengths}
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
    return Work(passages, prompts), right


def _passages(documents: list[list[int]], start: list[int], length: int, settings: Settings) -> list[list[int]]:
    """Passages from anywhere in the documents that do not overlap."""
    step = length - len(start)
    all_passages = [
        start + document[at : at + step] for document in documents for at in range(0, len(document) - step + 1, step)
    ]
    if not all_passages:
        raise UsageError(f"--length {length}: no held-out text is so long; choose a shorter one")
    wanted = settings.tokens // length
    return random.Random(settings.seed).sample(all_passages, min(wanted, len(all_passages)))


def _check(checkpoint: Checkpoint, candidates: Sequence[Checkpoint], settings: Settings) -> None:
    """Raise UsageError for models that cannot be measured so."""
    if checkpoint.plan is not None:
        raise UsageError(
            f"model {checkpoint.name}: it has an attention plan; give the stock model here and this as --planned"
        )
    for each in candidates:
        if each.config.get("vocab_size") != checkpoint.config.get("vocab_size"):
            raise UsageError(
                f"--planned {each.name}: its vocab_size is {each.config.get('vocab_size')}, the stock model's "
                f"{checkpoint.config.get('vocab_size')}; give a checkpoint made from {checkpoint.name}"
            )
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and max(settings.lengths) >= longest:
        raise UsageError(
            f"--length {max(settings.lengths)}: the model takes fewer than {longest} tokens; choose a shorter one"
        )


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, model_max_length=sys.maxsize)  # articles are long: no warnings
    except (OSError, ValueError) as error:
        raise UsageError(f"model {model}: no tokenizer is to be had ({one_line(error)}); add its files") from error


def _engine_arguments(model: str, work: Work) -> list[str]:
    """Options before the user's own: a start is not worth compiling for, and memory for logits stays small."""
    return [
        *("--model", model, "--skip-tokenizer-init", "--enforce-eager", "--no-async-scheduling"),
        *("--max-model-len", str(work.max_model_len), "--max-num-batched-tokens", "2048"),
    ]


def _reply(
    vllm_args: Sequence[str],
    overrides: dict[str, Any],
    work: Work,
    with_prompts: bool,
    advance: Callable[[int], None],
) -> Replies:
    """Do the work in a process of its own.

    Raises:
        UsageError: where the engine does not start or does not finish.

    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as log:
        engine = context.Process(target=_engine, args=(sending, log.name, vllm_args, overrides, work, with_prompts))
        engine.start()
        sending.close()  # so that its end is seen here when the process ends
        message: Any = None
        try:
            while isinstance(message := receiving.recv(), int):
                advance(message)
        except EOFError:
            engine.join()
            message = Failure(f"the engine ended with exit code {engine.exitcode}; the end of its log is above", True)
        finally:
            assert engine.pid is not None
            if not isinstance(message, Replies | Failure):  # interrupted
                engine.terminate()
            engine.join(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)  # its workers
            engine.join()
        if isinstance(message, Failure):
            if message.with_log:
                lines = [line for line in log.read().splitlines() if line.strip()]
                Console(stderr=True, highlight=False).print("\n".join(lines[-LOG_LINES:]), markup=False)
            raise UsageError(message.reason)
        assert isinstance(message, Replies)
        return message


def _engine(
    sending: Connection,
    log: str,
    vllm_args: Sequence[str],
    overrides: dict[str, Any],
    work: Work,
    with_prompts: bool,
) -> None:
    """The process: sends numbers of tokens done, and at last its replies or why there are none."""
    os.setsid()  # so that its workers can be found, and Ctrl-C in the terminal does not reach it
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm_ext.scoring import reply

        sending.send(reply(vllm_args, overrides, work, with_prompts, sending.send))
    except SystemExit:  # vLLM's parser of options
        sending.send(Failure("vLLM does not take these options; its complaint is above", with_log=True))
    except ValueError as error:  # how vLLM refuses settings
        traceback.print_exc()
        sending.send(Failure(one_line(error), with_log=os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"))
    except Exception as error:
        traceback.print_exc()
        reason = f"the engine failed ({type(error).__name__}: {one_line(error)}); the end of its log is above"
        sending.send(Failure(reason, with_log=True))


def _figures(
    ours: Replies,
    stock: Replies,
    scores: dict[str, list[float]],
    stock_scores: dict[str, list[float]],
    seed: int,
    is_stock: bool,
) -> Figures:
    """One model's figures, beside those of the stock model unless it is that."""

    def perplexities(scored: dict[int, list[Scored]], theirs: dict[int, list[Scored]]) -> dict[int, Figure]:
        return {
            length: perplexity(passages, None if is_stock else theirs[length], seed)
            for length, passages in scored.items()
        }

    def agreements(scored: dict[int, list[Scored]], theirs: dict[int, list[Scored]]) -> dict[int, Figure]:
        return {} if is_stock else {n: agreement(passages, theirs[n], seed) for n, passages in scored.items()}

    return Figures(
        perplexity=perplexities(ours.prompts, stock.prompts),
        agreement=agreements(ours.prompts, stock.prompts),
        answer_perplexity=perplexities(ours.answers, stock.answers),
        answer_agreement=agreements(ours.answers, stock.answers),
        capitals=accuracy(scores["capitals"], None if is_stock else stock_scores["capitals"], seed),
        sums=accuracy(scores["sums"], None if is_stock else stock_scores["sums"], seed),
    )


def _rows(figures: Figures, lengths: Sequence[int]) -> dict[str, Figure | None]:
    """The table's rows, by their titles."""
    rows: dict[str, Figure | None] = {}
    for length in lengths:
        tokens = Work.answer_tokens(length)
        answers = f"{tokens} tokens after {length - tokens}"
        rows[f"perplexity, prompts of {length}"] = figures.perplexity.get(length)
        rows[f"top token as stock's, prompts of {length}"] = figures.agreement.get(length)
        rows[f"perplexity, {answers}"] = figures.answer_perplexity.get(length)
        rows[f"top token as stock's, {answers}"] = figures.answer_agreement.get(length)
    return rows | {f"capitals, {SHOTS} examples": figures.capitals, f"two-digit sums, {SHOTS} examples": figures.sums}


def _print(report: dict[str, Any], figures: dict[str, Figures]) -> None:
    settings = report["settings"]
    table = Table(
        title=f"{report['model']}, beside stock: × its figure, and the 95% interval over the items",
        caption=f"{report['vllm']}; {report['machine']}; seed {settings['seed']}; {report['prose']}",
    )
    table.add_column("")
    table.add_column("items", justify="right")
    for name in figures:
        table.add_column(name, justify="right")
    rows = {name: _rows(each, settings["lengths"]) for name, each in figures.items()}
    for title in rows[STOCK]:
        of_all = [of_one[title] for of_one in rows.values()]
        items = next((str(each.items) for each in of_all if each is not None), "-")
        table.add_row(title, items, *map(_cell, of_all))
    Console(highlight=False).print(table)


def _cell(figure: Figure | None) -> str:
    """`18.92  1.062× 1.055-1.070`, or `0.91  0.90-0.92` of a figure without a ratio."""
    if figure is None:
        return "-"
    ratio = "" if figure.ratio is None else f"  {figure.ratio:.3f}×"
    interval = "" if figure.interval is None else f"  {figure.interval[0]:.3f}-{figure.interval[1]:.3f}"
    return f"{figure.value:.{3 if figure.value < 1 else 2}f}{ratio}{interval}"


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
