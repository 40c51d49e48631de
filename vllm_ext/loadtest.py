"""`vllm-ext loadtest`: load tests that settle arguments; they are in `loadtests/`, which speaks HTTP only.

Locust, which patches the process that imports it, runs in one of its own.
"""

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_ext.errors import UsageError
from vllm_ext.options import errors

if TYPE_CHECKING:
    from loadtests.answer import Objective
    from loadtests.run import Settings

app = typer.Typer(no_args_is_help=True, help="Load tests: what serves more within the same latency promise?")
MAX_URL_SECONDS = 10

Ttft = Annotated[float, typer.Option(help="The promise: seconds to the first token, for 95% of requests.")]
Itl = Annotated[float, typer.Option(help="The promise: seconds between chunks of tokens, for 95% of them.")]
Goodput = Annotated[float, typer.Option(help="The part of requests that must be answered within the promise.")]
Scale = Annotated[float, typer.Option(help="Multiplies all lengths, for small models and machines.")]
Api = Annotated[str, typer.Option(help="completions, with token ids, or chat, with words of a token each.")]
Arrival = Annotated[str, typer.Option(help="poisson, constant or bursts.")]
Warmup = Annotated[float, typer.Option(help="Seconds of each run that are discarded.")]
Duration = Annotated[float, typer.Option(help="Seconds of requests that each run measures.")]
Tolerance = Annotated[float, typer.Option(help="How closely the highest rate is found, as a part of it.")]
Start = Annotated[float | None, typer.Option(help="The first rate to try, requests a second; by default found.")]
Seed = Annotated[int, typer.Option(help="For prompts, lengths and arrivals.")]
VocabSize = Annotated[int, typer.Option(help="Prompts' token ids are drawn below it.")]
Tokenizer = Annotated[str, typer.Option(help="A tokenizer's folder, for chat, where a server has no /tokenize.")]


@app.command("saturate")
def saturate(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible server's URL.")],
    workload: Annotated[str, typer.Option("--profile", help="What is asked; see compare.")] = "chat",
    ttft: Ttft = 2.0,
    itl: Itl = 0.2,
    goodput: Goodput = 0.95,
    scale: Scale = 1.0,
    api: Api = "completions",
    arrival: Arrival = "poisson",
    warmup: Warmup = 5.0,
    duration: Duration = 30.0,
    tolerance: Tolerance = 0.05,
    start: Start = None,
    seed: Seed = 0,
    vocab_size: VocabSize = 32_000,
    tokenizer: Tokenizer = "",
) -> None:
    """Find the highest rate, in requests a second, at which a server keeps the promise, and print it."""
    from loadtests.compare import warm_up
    from loadtests.run import run
    from loadtests.saturation import saturate as search

    with _refusing():
        objective, settings = _asked(
            ttft, itl, goodput, scale, api, arrival, warmup, duration, vocab_size, tokenizer, (workload,)
        )
        seeds = iter(range(seed, 2**31))

        def holds(rate: float) -> bool:
            with errors.status(f"{rate:.4g} requests/s"):
                found = run(url, settings, objective, rate, next(seeds)).figures
            why = "ended early" if found.given_up else "steady" if found.steady else "not steady"
            errors.print(f"{rate:.4g} requests/s: {found.good:.3f} within the promise, {why}")
            return found.good >= goodput and found.steady and not found.given_up

        print(f"{search(holds, start or warm_up(url, settings, next(seeds)), tolerance):.4g}")


@app.command("compare", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
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
    ttft: Ttft = 2.0,
    itl: Itl = 0.2,
    goodput: Goodput = 0.95,
    scale: Scale = 1.0,
    api: Api = "completions",
    arrival: Arrival = "poisson",
    warmup: Warmup = 5.0,
    duration: Duration = 30.0,
    tolerance: Tolerance = 0.1,
    start: Start = None,
    seed: Seed = 0,
    vocab_size: VocabSize = 32_000,
    tokenizer: Tokenizer = "",
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
        objective, settings = _asked(
            ttft, itl, goodput, scale, api, arrival, warmup, duration, vocab_size, tokenizer, profiles
        )
        plan = Plan(profiles, objective, settings, rounds, tolerance, start, seed, not in_turn, prometheus)
        requirements = [Requirement.parse(text, profiles) for text in require or []]
        sides = dict(zip(SIDES, (_side(each, context.args) for each in (a, b)), strict=True))
        _make(out)
        errors.print(f"report: {out.resolve() / 'report.html'}, when done")
        with progress() as bar:
            task = bar.add_task("", total=rounds * len(profiles) * 2)

            def step(text: str) -> None:
                bar.update(task, description=text)
                if "common" in text:
                    bar.advance(task)

            described = {side: shlex.join([each, *context.args]) for side, each in zip(SIDES, (a, b), strict=True)}
            command = shlex.join(["vllm-ext", *sys.argv[1:]])
            missed: list[str] = []

            def save(results: Results) -> None:
                missed[:] = write(results, out, requirements, command)

            results = Comparison(plan, sides, described).measure(step, save)
    for each in profiles:
        print(verdict(results, each, ratios(results, each)))
    for text in missed:
        errors.print(f"not met: {text}", markup=False)
    print(out.resolve() / "report.html")
    raise typer.Exit(1 if missed else 0)


def _asked(
    ttft: float,
    itl: float,
    goodput: float,
    scale: float,
    api: str,
    arrival: str,
    warmup: float,
    duration: float,
    vocab_size: int,
    tokenizer: str,
    profiles: Sequence[str],
) -> "tuple[Objective, Settings]":
    """The promise and how runs ask, checked."""
    from loadtests.answer import Objective
    from loadtests.arrivals import schedule
    from loadtests.run import Settings
    from loadtests.workloads import Texts, Workload

    for each in profiles:
        Workload(each, "", api, scale=scale, vocab_size=vocab_size, texts=Texts())
    schedule(arrival, 1.0)
    if not (duration > 0 and warmup >= 0):
        raise UsageError(f"--duration {duration:g} --warmup {warmup:g}: seconds above 0, and not below 0")
    settings = Settings(profiles[0], api, scale, arrival, warmup, duration, vocab_size=vocab_size, tokenizer=tokenizer)
    return Objective(ttft, itl, goodput), settings


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

    if given.startswith(("http://", "https://")):
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
    command = [sys.executable, "-m", "vllm_ext.cli", "serve", *model_and_args, "--port", str(port)]
    with running([*command, "--host", "127.0.0.1"], port) as url:
        yield url
