"""`vllm-ext serve`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_ext.cli.options import VLLM_OPTIONS, Agreement, Freeze, Head, Model, Skip, Window
from vllm_ext.errors import UsageError

app = typer.Typer()


@app.command("serve", context_settings=VLLM_OPTIONS)
def serve(
    context: typer.Context,
    model: Model,
    skip: Skip = None,
    window: Window = None,
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
        int, typer.Option(min=1, envvar="VLLM_EXT_MAX_N", help="Requests for more choices get 400.")
    ] = 128,
    max_output_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="VLLM_EXT_MAX_OUTPUT_TOKENS",
            help="Requests for more get 400; who names no number gets as many at most.",
        ),
    ] = 16384,
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

    Without --skip, --window, --freeze or --head it serves the checkpoint as it is, stock or planned.
    """
    from serving.supervisor import end_at_once, is_supervised, obey, supervise

    is_server = is_supervised()
    (obey if is_server else end_at_once)()

    from serving.block_size import check_named
    from serving.key_file import read_keys
    from serving.settings import ServerSettings
    from vllm_ext.layers import layer_plans
    from vllm_ext.served import Served
    from vllm_ext.versions import vllm_problem

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
        api_key_file=api_key_file,
        metrics_port=metrics_port,
        log_format=log_format,
        allow_code=allow_code,
    )
    read_keys(api_key_file)
    changes = None if skip is window is freeze is None else layer_plans(skip, window, freeze)
    served = Served.open(model, changes, head, agreement, weights=False)
    if problem := vllm_problem():
        raise UsageError(problem)
    if "kv_lora_rank" not in served.checkpoint.config:  # multi-head latent attention has other blocks
        check_named(context.args)
    if not is_server:
        sys.exit(supervise(drain_seconds))

    from serving.server import serve as run

    options = [name for each in context.command.params for name in each.opts if name.startswith("--")]
    run(served, context.args, settings, options)
