"""`vllm-ext loadtest`: load tests that settle arguments; they are in `loadtests/`, which speaks HTTP only.

Locust, which patches the process that imports it, runs in one of its own.
"""

import contextlib
import functools
import inspect
import itertools
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_ext.cli.options import errors
from vllm_ext.errors import UsageError

if TYPE_CHECKING:
    from loadtests.answer import Objective
    from loadtests.run import Settings

app = typer.Typer(no_args_is_help=True, help="Load tests: what serves more within the same latency promise?")
MAX_URL_SECONDS = 10
URL = ("http://", "https://")


@dataclass(frozen=True)
class Asked:
    """What is promised and how runs ask: the options that `saturate` and `compare` share."""

    ttft: Annotated[float, typer.Option(help="The promise: seconds to the first token, for 95% of requests.")] = 2.0
    itl: Annotated[float, typer.Option(help="The promise: seconds between chunks of tokens, for 95% of them.")] = 0.2
    goodput: Annotated[float, typer.Option(help="The part of requests that must be answered within the promise.")] = (
        0.95
    )
    scale: Annotated[float, typer.Option(help="Multiplies all lengths, for small models and machines.")] = 1.0
    api: Annotated[str, typer.Option(help="completions, with token ids, or chat, with words of a token each.")] = (
        "completions"
    )
    arrival: Annotated[str, typer.Option(help="poisson, constant or bursts.")] = "poisson"
    warmup: Annotated[float, typer.Option(help="Seconds of each run that are discarded.")] = 5.0
    duration: Annotated[float, typer.Option(help="Seconds of requests that each run measures.")] = 30.0
    cut: Annotated[
        bool, typer.Option("--cut", help="End runs with these seconds; long answers are judged by what has come.")
    ] = False
    tolerance: Annotated[float, typer.Option(help="How closely the highest rate is found, as a part of it.")] = 0.1
    start: Annotated[float | None, typer.Option(help="The first rate to try, requests/s; by default found.")] = None
    seed: Annotated[int, typer.Option(help="For prompts, lengths and arrivals.")] = 0
    vocab_size: Annotated[int, typer.Option(help="Prompts' token ids are drawn below it.")] = 32_000
    tokenizer: Annotated[str, typer.Option(help="A tokenizer's folder, for chat, if a server has no /tokenize.")] = ""

    def checked(self, profiles: Sequence[str]) -> "tuple[Objective, Settings]":
        """The promise and how runs ask.

        Raises:
            ValueError: for what cannot be.

        """
        from loadtests.answer import Objective
        from loadtests.arrivals import schedule
        from loadtests.run import Settings
        from loadtests.workloads import Texts, Workload

        for each in profiles:
            Workload(each, "", self.api, scale=self.scale, vocab_size=self.vocab_size, texts=Texts())
        schedule(self.arrival, 1.0)
        if not (self.duration > 0 and self.warmup >= 0):
            raise UsageError(f"--duration {self.duration:g} --warmup {self.warmup:g}: seconds above 0, and not below 0")
        shared = {each.name for each in fields(Settings)} & {each.name for each in fields(self)}
        settings = Settings(profiles[0], **{name: getattr(self, name) for name in shared})
        return Objective(self.ttft, self.itl, self.goodput), settings


def _asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options of `Asked` in place of its parameter of that name; typer reads the signature."""
    shared = inspect.signature(Asked).parameters
    own = [each for name, each in inspect.signature(command).parameters.items() if name != "asked"]

    @functools.wraps(command)
    def spread(**given: Any) -> None:
        command(asked=Asked(**{name: given.pop(name) for name in shared}), **given)

    parameters = [*own, *shared.values()]
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    return spread


@app.command("saturate")
@_asking
def saturate(
    asked: Asked,
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server's URL.")],
    workload: Annotated[str, typer.Option("--profile", help="What is asked; see compare.")] = "chat",
) -> None:
    """Find the highest rate, in requests a second, at which a server keeps the promise, and print it."""
    from loadtests.run import Pace, warm_up
    from loadtests.saturation import saturate as search

    with _refusing():
        objective, settings = asked.checked((workload,))
        texts = itertools.count(asked.seed)
        with errors.status("warms up"):
            served, token_seconds = warm_up(url, settings, next(texts))
        pace = Pace(token_seconds)

        def holds(rate: float) -> bool:
            with errors.status(f"{rate:.4g} requests/s"):
                found = pace.run(url, settings, objective, rate, asked.seed, next(texts)).figures
            why = "ended early" if found.given_up else "steady" if found.steady else "not steady"
            errors.print(f"{rate:.4g} requests/s: {found.good:.3f} within the promise, {why}")
            return found.held(objective)

        print(f"{search(holds, asked.start or served, asked.tolerance):.4g}")


@app.command("compare", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_asking
def compare(
    asked: Asked,
    context: typer.Context,
    a: Annotated[str, typer.Argument(help="The baseline: a URL, or 'MODEL [options of vllm-ext serve]' to start.")],
    b: Annotated[str, typer.Argument(help="What is compared with it: the same.")],
    out: Annotated[Path, typer.Option(help="The folder for report.html, report.json and junit.xml.")] = Path(
        "loadtest"
    ),
    profile: Annotated[
        list[str] | None,
        typer.Option(help="chat, rag, summarise, generate, longcontext, sharedprefix, mixed; by default chat and rag."),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="A threshold that exits with 1 when missed: goodput_ratio>=1.2, chat:ttft_p95_ratio<=1."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often both are measured; two at least tell chance.")] = 3,
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="Start each server for its turn alone, where both do not fit.")
    ] = False,
    prometheus: Annotated[
        str, typer.Option(help="A Prometheus that scrapes both, to take metrics from; by default they are scraped.")
    ] = "",
) -> None:
    """Measure how many more requests B serves than A within the same latency promise; other options go to servers.

    Exits with 1 where a --require is not met.
    """
    from loadtests.compare import SIDES, Comparison, Plan, Results, ratios, verdict
    from loadtests.report import write
    from loadtests.requirements import Requirement
    from vllm_ext.progress import progress

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers it started end with it
    profiles = tuple(profile or ("chat", "rag"))
    with _refusing():
        objective, settings = asked.checked(profiles)
        searched = asked.tolerance, asked.start, asked.seed
        plan = Plan(profiles, objective, settings, rounds, *searched, not in_turn, prometheus)
        requirements = [Requirement.parse(text, profiles) for text in require or []]
        if prometheus and not all(each.startswith(URL) for each in (a, b)):
            raise UsageError("--prometheus: it cannot scrape servers that are yet to start; give both sides as URLs")
        sides = dict(zip(SIDES, (_side(each, context.args) for each in (a, b)), strict=True))
        _make(out)
        errors.print(f"report: {out.resolve() / 'report.html'}, when done")
        with progress() as bar:
            task = bar.add_task("", total=rounds * len(profiles) * 2)

            def step(text: str) -> None:
                bar.update(task, description=text, completed=comparison.turns)

            described = {side: shlex.join([each, *context.args]) for side, each in zip(SIDES, (a, b), strict=True)}
            command = shlex.join(["vllm-ext", *sys.argv[1:]])
            missed: list[str] = []

            def save(results: Results) -> None:
                missed[:] = write(results, out, requirements, command)

            comparison = Comparison(plan, sides, described)
            results = comparison.measure(step, save)
    for each in profiles:
        print(verdict(results, each, ratios(results, each)))
    for text in missed:
        errors.print(f"not met: {text}", markup=False)
    print(out.resolve() / "report.html")
    raise typer.Exit(1 if missed else 0)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What loadtests refuses is a user's mistake."""
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror}; name a folder that can be made") from error


def _side(given: str, vllm_args: Sequence[str]) -> "Callable[[], AbstractContextManager[str]]":
    """How to have that side's server there: found at its URL, or started."""
    import httpx

    if given.startswith(URL):
        url = given.rstrip("/")
        try:
            httpx.get(f"{url}/v1/models", timeout=MAX_URL_SECONDS, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            raise UsageError(f"{url}: no OpenAI-compatible server there ({error}); start it first") from error
        return lambda: contextlib.nullcontext(url)
    words = shlex.split(given)
    if not words:
        raise UsageError("a side is a URL, or a model with options; it is empty")
    from vllm_ext.checkpoint import Checkpoint

    Checkpoint.open(words[0], weights=False)
    return lambda: _started([*words, *vllm_args])


@contextlib.contextmanager
def _started(model_and_args: Sequence[str]) -> Iterator[str]:
    from vllm_ext.process import free_port, running

    port = free_port()
    command = [sys.executable, "-m", "vllm_ext.cli.main", "serve", *model_and_args, "--port", str(port)]
    with running([*command, "--host", "127.0.0.1"], port) as url:
        yield url
