"""`vllm-ext loadtest`: load tests that settle arguments; they are in `loadtests/`, which speaks HTTP only.

Locust, which patches the process that imports it, runs in one of its own. Options are those that `loadtests` declares,
read by its own parser, so that Locust's command line and this one have the same.
"""

import contextlib
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vllm_ext.cli.options import end_cleanly, errors
from vllm_ext.errors import UsageError

if TYPE_CHECKING:
    from loadtests.options import Parser

app = typer.Typer(no_args_is_help=True, help="Load tests: what serves more within the same latency promise?")
MAX_URL_SECONDS = 10
URL = ("http://", "https://")
UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True}
OF_A_RUN = ("workload", "model", "rate", "speed", "under_way", "text_seed")
"""What a search settles for each run, or the command's own options do."""


@app.command("saturate", context_settings=UNREAD, add_help_option=False)
def saturate(context: typer.Context) -> None:
    """Find the highest rate, in requests a second, at which a server keeps a promise, and print it."""
    from loadtests.answer import Objective
    from loadtests.options import add_options, read_options
    from loadtests.run import Pace, warm_up
    from loadtests.saturation import saturate as search
    from loadtests.settings import Load
    from loadtests.texts import Texts
    from loadtests.watch import BOUND

    with _refusing():
        parser = _parser("saturate", saturate.__doc__)
        parser.add_argument("url", help="An OpenAI-compatible server's URL.")
        add_options(parser, Load, set(OF_A_RUN) - {"workload"})
        add_options(parser, Objective)
        parser.add_argument("--tolerance", type=float, default=0.1, metavar="X", help="How closely the highest rate is "
            "found, as a part of it. Default: 0.1.")  # fmt: skip
        parser.add_argument("--start", type=float, metavar="X", help="The first rate to try; by default found.")
        parser.add_argument("--client-bound", type=float, default=BOUND, metavar="X", help="Seconds at the median by "
            f"which this client's times may be wrong in a run. Default: {BOUND:g}.")  # fmt: skip
        given = parser.parse_args(context.args)
        load, objective = read_options(given, Load, speed=0.0), read_options(given, Objective)
        load.asks(texts=Texts())
        texts = itertools.count(load.seed)
        with errors.status("warms up"):
            served, token_seconds = warm_up(given.url, replace(load, seed=next(texts)))
        pace = Pace(token_seconds)

        def holds(rate: float) -> bool:
            with errors.status(f"{rate:.4g} requests/s"):
                done = pace.run(given.url, replace(load, rate=rate, text_seed=next(texts)), objective)
            if why := done.client.void(given.client_bound):
                raise UsageError(why)
            found = done.figures
            why = "ended early" if found.given_up else "steady" if found.steady else "not steady"
            errors.print(f"{rate:.4g} requests/s: {found.good:.3f} within the promise, {why}")
            return found.held(objective)

        print(f"{search(holds, given.start or served, given.tolerance):.4g}")


@app.command("compare", context_settings=UNREAD, add_help_option=False)
def compare(context: typer.Context) -> None:
    """Measure how many more requests B serves than A within the same latency promise.

    Options that are none of these go to the servers that it starts. Exits with 1 where a --require is not met.
    """
    from loadtests.answer import Objective
    from loadtests.compare import Comparison
    from loadtests.guidellm import read_guidellm
    from loadtests.options import add_options, read_options
    from loadtests.report import write
    from loadtests.requirements import Requirement
    from loadtests.results import Plan, Results
    from loadtests.settings import Load
    from loadtests.threshold import SIDES
    from loadtests.verdict import missing, quality, verdict
    from loadtests.workloads import NAMES
    from vllm_ext.progress import progress

    end_cleanly()
    with _refusing():
        parser = _parser("compare", compare.__doc__)
        parser.add_argument("a", help="The baseline: a URL, 'MODEL [options of vllm-ext serve]' to start, or "
            "GuideLLM's benchmarks.json.")  # fmt: skip
        parser.add_argument("b", help="What is compared with it: the same.")
        parser.add_argument("--out", type=Path, default=Path("loadtest"), metavar="FOLDER", help="Where the report "
            "goes: report.html, report.json and junit.xml. Default: loadtest.")  # fmt: skip
        parser.add_argument("--workload", action="append", metavar="NAME", help="What is asked, of "
            f"{', '.join(NAMES)}; may be repeated. Default: chat and rag.")  # fmt: skip
        parser.add_argument("--require", action="append", default=[], metavar="THRESHOLD", help="What exits with 1 "
            "when missed: goodput_ratio>=1.2, chat:ttft_p95_ratio<=1; may be repeated.")  # fmt: skip
        add_options(parser, Load, OF_A_RUN)
        add_options(parser, Objective)
        add_options(parser, Plan)
        given, for_servers = parser.parse_known_args(context.args)
        given.workload = workloads = tuple(given.workload or ("chat", "rag"))
        load, objective = read_options(given, Load, workload=workloads[0], speed=0.0), read_options(given, Objective)
        plan = read_options(given, Plan, workloads=workloads, objective=objective, load=load)
        requirements = [Requirement.parse(text, workloads) for text in given.require]
        urls = [each for each in (given.a, given.b) if each.startswith(URL)]
        if for_servers and len(urls) == 2:
            raise UsageError(f"{for_servers[0]}: no option of compare, which starts no server here; see --help")
        if plan.prometheus and len(urls) < 2:
            raise UsageError("--prometheus: it cannot scrape servers that are yet to start; give both sides as URLs")
        named = dict(zip(SIDES, (given.a, given.b), strict=True))
        imported = {side: read_guidellm(Path(each)) for side, each in named.items() if each.endswith(".json")}
        sides = {side: _side(each, for_servers) for side, each in named.items() if side not in imported}
        _make(given.out)
        errors.print(f"report: {given.out.resolve() / 'report.html'}, from the first pair of runs on")
        described = {side: shlex.join([each, *for_servers]) for side, each in named.items()}
        command = shlex.join(["vllm-ext", *sys.argv[1:]])
        missed: list[str] = []
        comparison = Comparison(plan, sides, described, imported)

        def save(results: Results) -> None:
            missed[:] = write(results, given.out, requirements, command)

        try:
            with progress() as bar:
                task = bar.add_task("", total=100)

                def step(text: str) -> None:
                    bar.update(task, description=text, completed=min(100 * comparison.gone, 99))

                results = comparison.measure(step, save)
        finally:
            if comparison.results.gain and not comparison.results.complete:
                errors.print(f"ended early; the report has what was measured: {given.out.resolve()}", markup=False)
    for each in results.gain:
        print(verdict(results, each))
        print(quality(results, each))
    for text in missing(results):
        print(text)
    for text in missed:
        errors.print(f"not met: {text}", markup=False)
    print(given.out.resolve() / "report.html")
    raise typer.Exit(1 if missed else 0)


def _parser(command: str, text: str | None) -> "Parser":
    from loadtests.options import Parser

    return Parser(prog=f"vllm-ext loadtest {command}", description=text)


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
