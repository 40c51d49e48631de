"""vLLM's arguments, parsed by vLLM, checked by us, and with our settings in them."""

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serving import cpu
from serving.key_file import check_key
from serving.port import check_port
from serving.settings import ARGUMENT, ServerSettings
from vllm_ext.errors import UsageError
from vllm_ext.served import Served

DEFAULT_HOST = "127.0.0.1"
MIDDLEWARE = "serving.middleware.Endpoint"
PICKLED_FORMATS = ("pt", "npcache")  # vLLM's names for weights that are read with pickle


class _Parser(FlexibleArgumentParser):
    """vLLM's, which raises where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parse(model: str, vllm_args: Sequence[str], options: Sequence[str] = ()) -> argparse.Namespace:
    """vLLM's arguments for `model`, those in a `--config` file too; `options` are the names of ours.

    Raises:
        UsageError: for an option that there is not, with the one that was meant, or a value that cannot be.

    """
    command = ServeSubcommand()
    parser = _Parser(prog="vllm-ext")
    known = command.subparser_init(parser.add_subparsers(dest="subparser"))
    try:
        args: argparse.Namespace = parser.parse_args([command.name, model, *vllm_args])
    except UsageError as error:
        _, unrecognized, given = str(error).partition("unrecognized arguments: ")
        if not unrecognized:
            raise
        names = [name for action in known._actions for name in action.option_strings]
        raise UsageError(_unknown(given.split()[0].partition("=")[0], [*names, *options])) from error
    return args


def _unknown(given: str, names: Sequence[str]) -> str:
    if not given.startswith("-"):
        return f"{given}: it belongs to no option; leave it out"
    meant = difflib.get_close_matches(given.replace("_", "-"), names, 1)
    return f"{given}: no such option; {f'did you mean {meant[0]}?' if meant else 'see `vllm serve --help=all`'}"


def prepare(args: argparse.Namespace, served: Served, settings: ServerSettings, keys: list[str]) -> argparse.Namespace:
    """Check the arguments and put our settings into them, so that vLLM can be run with them.

    Raises:
        UsageError: for what would show a key, run code from the checkpoint, or fail minutes later.

    """
    configure_logging_from_args(args)
    _check_keys(args)
    _check_code(args, served, settings.allow_code)
    if served.checkpoint.folder is not None and args.load_format in ("auto", "safetensors"):
        served.checkpoint.check_weights()
    _listen(args, settings)
    if overrides := served.hf_overrides():
        if callable(args.hf_overrides):
            raise UsageError("--hf-overrides beside a plan must be a JSON object")
        args.hf_overrides = {**(args.hf_overrides or {}), **overrides}
    if current_platform.is_cpu():
        cpu.set_defaults(args)
    args.api_key = keys or None
    _apply(args, settings)
    return args


def check_config(args: argparse.Namespace) -> VllmConfig:
    """Let vLLM work out its configuration, as it will do again in a moment, to see what it refuses."""
    args.model = args.model_tag
    ServeSubcommand().validate(args)
    validate_api_server_args(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER, headless=args.headless
    )
    if current_platform.is_cpu():
        cpu.check(config)
    return config


def api_servers(args: argparse.Namespace) -> int:
    """How many API server processes vLLM will start: by itself one for each data-parallel engine behind them."""
    if args.api_server_count is not None:
        return int(args.api_server_count)
    balanced = args.data_parallel_multi_port_external_lb or args.data_parallel_external_lb
    if balanced or args.data_parallel_rank is not None:
        return 1
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        return int(args.data_parallel_size_local or 1)
    return int(args.data_parallel_size)


def _check_keys(args: argparse.Namespace) -> None:
    if args.api_key:
        raise UsageError("--api-key: whoever lists processes would see it; use --api-key-file, or VLLM_API_KEY")
    if key := os.environ.get("VLLM_API_KEY"):
        check_key(key, "VLLM_API_KEY")


def _check_code(args: argparse.Namespace, served: Served, allow_code: bool) -> None:
    """Refuse what would run code from the checkpoint."""
    if allow_code:
        return
    if args.trust_remote_code:
        raise UsageError(
            "--trust-remote-code: it runs code from the checkpoint; add --allow-code-from-checkpoint if you trust it"
        )
    if args.load_format in PICKLED_FORMATS:
        raise UsageError(
            f"--load-format {args.load_format}: pickled weights can run code; convert them to safetensors, or add "
            "--allow-code-from-checkpoint if you trust them"
        )
    if served.checkpoint.folder is None and args.load_format == "auto":
        args.load_format = "safetensors"  # what a hub holds is not known yet, and vLLM would fall back to pickle


def _listen(args: argparse.Namespace, settings: ServerSettings) -> None:
    if args.headless or args.uds:
        return
    args.host = args.host or DEFAULT_HOST  # vLLM would listen on every interface
    check_port(args.host, args.port)
    if settings.metrics_port == args.port:
        raise UsageError(f"--metrics-port {settings.metrics_port}: it is the server's own (--port); choose another")


def _apply(args: argparse.Namespace, settings: ServerSettings) -> None:
    """Turn our settings into vLLM's."""
    setattr(args, ARGUMENT, settings)
    args.middleware = [*args.middleware, MIDDLEWARE]
    args.enable_request_id_headers = False  # ours are always on
    if settings.max_output_tokens is not None:  # for requests that name no number
        overrides: dict[str, Any] = {"max_new_tokens": settings.max_output_tokens}
        args.override_generation_config = overrides | (args.override_generation_config or {})
    if settings.max_n is not None:
        os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(settings.max_n))
    if args.shutdown_timeout == 0:
        args.shutdown_timeout = int(settings.drain_seconds)
