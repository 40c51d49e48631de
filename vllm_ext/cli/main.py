"""The `vllm-ext` command."""

import signal
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from model_executors.attention_plan import FULL, AttentionPlan, Consolidation
from vllm_ext.cli.bench import app as bench_app
from vllm_ext.cli.heads import app as heads_app
from vllm_ext.cli.loadtest import app as loadtest_app
from vllm_ext.cli.options import VLLM_OPTIONS, Agreement, Data, Freeze, Head, Model, Skip, errors
from vllm_ext.errors import UsageError

if TYPE_CHECKING:
    from vllm_ext.offline.fit import Fit
    from vllm_ext.planner.judge import Judged

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The embedded default model, SmolLM2-135M-Instruct.")
app.add_typer(model_app, name="model")
app.add_typer(heads_app, name="heads")
app.add_typer(bench_app)
app.add_typer(loadtest_app, name="loadtest")


@model_app.command("fetch")
def model_fetch(
    to: Annotated[Path | None, typer.Option(help="The folder to make; by default one in your cache.")] = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="With the plan that `vllm-ext plan --auto` found for it.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="With the character heads that `vllm-ext heads train` made for it.")
    ] = False,
) -> None:
    """Turn the packaged model into a checkpoint, once, and print its folder."""
    from vllm_ext.embedded.model import NAME, fetch, fetch_heads, fetch_planned

    if planned and heads:
        raise UsageError("--planned --heads: the heads are for the model without a plan; take one of them")

    with errors.status(f"{NAME}: out of its package into a checkpoint, about half a minute the first time"):
        folder = (fetch_planned if planned else fetch_heads if heads else fetch)(to)
    print(folder)


@app.command("plan")
def plan(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    skip: Skip = None,
    window: Annotated[
        str | None, typer.Option(help="Layers to attend to their last tokens and a sink: 15-24:128,25-29:64.")
    ] = None,
    freeze: Annotated[
        str | None, typer.Option(help="Layers that prompt tokens end below: 20-29, or with a window 20-29:128.")
    ] = None,
    consolidation: Annotated[
        Consolidation | None, typer.Option(help="What skipped layers add in place of attention; by default none.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of linear maps; by default full.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help='Text to fit on: a .txt, a .jsonl with "text", or a folder of them; by default prose.'),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of it to fit on.")] = 32768,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each passage.")] = 1024,
    seed: Annotated[int, typer.Option(help="For which passages, and items of --auto, those are.")] = 0,
    auto: Annotated[bool, typer.Option("--auto", help="Search for the layers, and write a report beside.")] = False,
    max_loss: Annotated[
        float | None,
        typer.Option(help="With --auto: the part of the mean task score to lose at most; 0.02 by default."),
    ] = None,
    kv_saving: Annotated[
        float | None, typer.Option(help="With --auto: the part of the KV-cache bytes to save at least.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="With --auto: capitals, sums, reading, prose; by default all, or none beside --data."),
    ] = None,
    data: Data = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --auto: guess from what attentions look at.")] = False,
    front: Annotated[
        Path | None, typer.Option(help="With --auto: choose from an earlier search's front.json, for another goal.")
    ] = None,
    size: Annotated[int, typer.Option(help="With --auto: the tokens of a window.")] = 128,
    context: Annotated[int, typer.Option(help="With --auto: the tokens of requests to save for.")] = 4096,
    passes: Annotated[
        float, typer.Option(help="With --auto: the budget, in passes over the items searched with.")
    ] = 130,
) -> None:
    """Write a planned checkpoint, which vLLM serves with nothing else said.

    Windows and consolidation are fitted to the model on text first, which takes minutes for a small one. With --auto
    the layers are found by measuring: a search of half an hour for a small model, or a guess with --quick. With --front
    what an earlier search found is chosen from, and --skip, --window and --freeze name a plan to judge beside.
    """
    from vllm_ext.checkpoint import Checkpoint, check_out, write_planned
    from vllm_ext.layers import layer_plans

    named = {"--skip": skip, "--window": window, "--freeze": freeze}
    sought = {
        "--max-loss": max_loss,
        "--kv-saving": kv_saving,
        "--quick": quick or None,
        "--task": task,
        "--data": data,
        "--front": front,
    }
    misplaced: dict[str, Any] = sought
    if auto:
        misplaced = named if front is None else {}
    for option, value in misplaced.items():
        if value is not None:
            why = "--auto finds the layers itself; leave one of them out" if auto else "it is for --auto; add that"
            raise UsageError(f"{option} {value}: {why}")
    for option, value in (("--quick", quick), ("--task", task), ("--data", data)):
        if front is not None and value:
            raise UsageError(f"{option} {value}: --front has what its search was made with; leave one of them out")
    if not auto and skip is window is freeze is None:
        raise UsageError("plan needs --skip, --window, --freeze or --auto; say which layers to change")
    out = out.expanduser()
    check_out(out)
    checkpoint = Checkpoint.open(model, weights=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written is left
    changes = layer_plans(skip, window, freeze, consolidation, rank)

    @cache
    def fitted(attention_plan: AttentionPlan) -> "Fit | None":
        from vllm_ext.offline.fit import fit
        from vllm_ext.tasks.passages import read_texts
        from vllm_ext.tasks.texts import prose, prose_source

        if not attention_plan.fitted:
            return None
        texts = prose("calibration") if text is None else read_texts(text)
        name = prose_source() if text is None else text.name
        return fit(checkpoint, attention_plan, texts, name=name, tokens=tokens, length=length, seed=seed)

    @cache
    def judged(attention_plan: AttentionPlan) -> "Judged":
        changes = {layer: each for layer, each in enumerate(attention_plan.layers) if each != FULL}
        made = fitted(attention_plan)
        return planner.judge(changes, made.tensors if made else {})

    if auto:
        from vllm_ext.planner.judge import Goal
        from vllm_ext.planner.report import read, write
        from vllm_ext.planner.run import TASKS, Planner, Settings

        goal = Goal(0.02 if max_loss is kv_saving is None else max_loss, kv_saving)
        tasks = tuple(task or (() if data else TASKS))
        if front is not None:
            found = read(front)
            settings = Settings.of(found.header, goal, checkpoint)
            found.header["settings"] = asdict(settings)
            planner = Planner(checkpoint, settings)
            found.front = [planner.recounted(each) for each in found.front]
            if changes:
                found.front.append(judged(checkpoint.planned(changes)))
        else:
            settings = Settings(goal, tasks, tuple(data or ()), size, context, passes, seed, quick)
            planner = Planner(checkpoint, settings)
            found = planner.find()
        command = ["vllm-ext", *sys.argv[1:]]
        try:
            found.changes = found.changes or goal.choose(found.front).changes
        except UsageError as error:
            report = write(found, out.with_name(f"{out.name}-report"), command)
            raise UsageError(f"{error}; what was found is in {report}") from error
        changes = dict(found.changes)
    attention_plan = checkpoint.planned(changes)
    checkpoint.check_weights()
    write_planned(checkpoint, attention_plan, out, fitted(attention_plan))
    if auto:
        found.written = replace(judged(attention_plan))  # a row of its own
        errors.print(f"report: {write(found, out / 'report', command)}")
    print(out)


@app.command("serve", context_settings=VLLM_OPTIONS)
def serve(
    context: typer.Context,
    model: Model,
    skip: Skip = None,
    freeze: Freeze = None,
    head: Head = None,
    agreement: Agreement = None,
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="VLLM_EXT_API_KEY_FILE", help="A file with API keys, one a line.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, envvar="VLLM_EXT_METRICS_PORT", help="/metrics here, not on the main port."),
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, envvar="VLLM_EXT_MAX_BODY_BYTES", help="Larger bodies get 413.")
    ] = 32 * 2**20,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, envvar="VLLM_EXT_MAX_PROMPT_TOKENS", help="Longer prompts get 400.")
    ] = None,
    max_n: Annotated[
        int | None, typer.Option(min=1, envvar="VLLM_EXT_MAX_N", help="Requests for more choices get 400.")
    ] = None,
    max_output_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, envvar="VLLM_EXT_MAX_OUTPUT_TOKENS", help="Requests for more get 400; it is the default too."
        ),
    ] = None,
    max_concurrent_requests: Annotated[
        int | None,
        typer.Option(min=1, envvar="VLLM_EXT_MAX_CONCURRENT_REQUESTS", help="More at once wait, or get 429."),
    ] = None,
    max_queued_requests: Annotated[
        int,
        typer.Option(
            min=0, envvar="VLLM_EXT_MAX_QUEUED_REQUESTS", help="How many wait beside --max-concurrent-requests."
        ),
    ] = 0,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, envvar="VLLM_EXT_DRAIN_SECONDS", help="After SIGTERM, the time to finish requests in."),
    ] = 30,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(envvar="VLLM_EXT_LOG_FORMAT", help="json is an object a line.")
    ] = "text",
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code-from-checkpoint",
            help="Let --trust-remote-code and pickled weights run its code.",
        ),
    ] = False,
) -> None:
    """Serve a model on 127.0.0.1:8000 through vLLM; every option of `vllm serve` may follow.

    Without --skip, --freeze or --head it serves the checkpoint as it is, stock or planned.
    """
    from serving.settings import ServerSettings
    from vllm_ext.layers import layer_plans
    from vllm_ext.serve import Endpoint
    from vllm_ext.serve import serve as run
    from vllm_ext.served import Served

    if max_queued_requests and max_concurrent_requests is None:
        raise UsageError(
            f"--max-queued-requests {max_queued_requests}: it counts those beyond --max-concurrent-requests; give that "
            "too"
        )
    settings = ServerSettings(
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_n=max_n,
        max_output_tokens=max_output_tokens,
        max_concurrent_requests=max_concurrent_requests,
        max_queued_requests=max_queued_requests,
        drain_seconds=drain_seconds,
    )
    endpoint = Endpoint(settings, api_key_file, metrics_port, log_format, allow_code)
    changes = None if skip is freeze is None else layer_plans(skip=skip, freeze=freeze)
    served = Served.open(model, changes, head, agreement, vllm_args=context.args)
    run(served, context.args, endpoint)


@app.command("quality", context_settings=VLLM_OPTIONS)
def quality(
    context: typer.Context,
    model: Model,
    planned: Annotated[list[str] | None, typer.Option(help="A planned checkpoint; may be given several times.")] = None,
    skip: Skip = None,
    freeze: Freeze = None,
    head: Head = None,
    agreement: Annotated[
        list[float] | None,
        typer.Option(help="Of planned checkpoints with character heads: agreements to serve each at, one by one."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a passage of prose; may be given several times; by default 512 and 2048."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of held-out prose, for each length.")] = 32768,
    items: Annotated[int, typer.Option(help="How many capitals, and how many sums.")] = 100,
    seed: Annotated[int, typer.Option(help="For which passages, capitals and sums those are.")] = 0,
) -> None:
    """Measure what plans cost, beside the stock MODEL: prose, capitals, sums; options of `vllm serve` go to all."""
    from vllm_ext.layers import layer_plans
    from vllm_ext.quality.command import candidates
    from vllm_ext.quality.command import quality as run
    from vllm_ext.quality.work import Settings

    settings = Settings(tuple(length or Settings.lengths), tokens, items, seed)
    changes = None if skip is freeze is None else layer_plans(skip=skip, freeze=freeze)
    given = {"skip": skip, "freeze": freeze, "head": head}
    overlaid = ", ".join(f"{option} {value}" for option, value in given.items() if value is not None)
    beside = candidates(model, planned or (), changes, head, agreement or (), overlaid=overlaid, vllm_args=context.args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines it started end with it
    run(model, beside, settings, context.args, json_file)


@app.command("probe")
def probe(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for results, pictures and report.html; a run goes on in it.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="capitals, sums, reading, prose, summaries; by default all, or none beside --data."),
    ] = None,
    data: Data = None,
    manipulation: Annotated[
        list[str] | None, typer.Option(help="random, shuffle, freeze, skip, drop; by default all of them.")
    ] = None,
    items: Annotated[int, typer.Option(help="Items of each task; of prose and summaries a fifth as many.")] = 40,
    every: Annotated[int, typer.Option(help="Only every so many layers.")] = 1,
    seed: Annotated[int, typer.Option(help="For which items those are, and what is random.")] = 0,
) -> None:
    """Find which layers read earlier tokens: the experiments of *Attend First, Consolidate Later* on MODEL.

    An interrupted run goes on where it stopped. Capitals, sums and prose of the embedded model take three minutes on
    two cores with --every 3 --items 20.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.probe.run import Settings
    from vllm_ext.probe.run import probe as run

    given: dict[str, Any] = {"tasks": [] if data and not task else task, "data": data, "manipulations": manipulation}
    chosen = {name: tuple(values) for name, values in given.items() if values is not None}
    settings = Settings(**chosen, items=items, every=every, seed=seed)
    results = run(Checkpoint.open(model, weights=True), out.expanduser(), settings)
    from vllm_ext.probe.report import write

    print(write(results, out.expanduser(), ["vllm-ext", *sys.argv[1:]]))


@app.command("doctor")
def doctor() -> None:
    """Say what is installed and supported here; exit with 1, and the cure, where something is wrong."""
    from vllm_ext.doctor import examine

    raise typer.Exit(0 if examine() else 1)


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    try:
        app()
    except UsageError as error:
        errors.print(f"error: {error}", markup=False, style="red")
        sys.exit(2)


if __name__ == "__main__":
    main()
