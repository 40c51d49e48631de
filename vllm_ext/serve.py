"""`vllm-ext serve`: vLLM's own OpenAI-compatible server, with a plan laid over a stock checkpoint.

vLLM's options stay vLLM's. Ours set its plugins, its middleware and its log format, and refuse what would run code from
a checkpoint or show a key to whoever lists processes. Everything that can be known beforehand is checked first, so that
a mistake costs a line and not a start.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import psutil

from serving.settings import ARGUMENT, ServerSettings
from serving.stopping import stopping
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError, one_line
from vllm_ext.served import Served
from vllm_ext.versions import PLUGIN, vllm_problem

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000  # vLLM's own
MIDDLEWARE = "serving.middleware.Endpoint"
# Plugins of these groups load unless VLLM_PLUGINS leaves them out; endpoints load only where it names them.
DEFAULT_GROUPS = ("general", "io_processor", "platform", "stat_logger")
PICKLED_FORMATS = ("pt", "npcache")  # vLLM's names for weights that are read with pickle


@dataclass(frozen=True)
class Endpoint:
    """How the server is reached, guarded and ended."""

    settings: ServerSettings
    api_key_file: Path | None = None
    metrics_port: int | None = None
    log_format: Literal["text", "json"] = "text"
    allow_code: bool = False
    """Whether code from the checkpoint may be run, and pickled weights read."""


def serve(served: Served, vllm_args: Sequence[str], endpoint: Endpoint | None = None) -> None:
    """Serve in the foreground until stopped.

    Raises:
        UsageError: for whatever a user can mend; what vLLM itself refuses included.
        SystemExit: with code 1 where the server ended without being told to, as when its engine died.

    """
    endpoint = endpoint or Endpoint(ServerSettings())
    keys = read_keys(endpoint.api_key_file)
    overrides = served.hf_overrides()
    check_listening(vllm_args)
    if problem := vllm_problem():
        raise UsageError(problem)
    allow_plugin()
    if several_processes(vllm_args) or served.head.kind != "stock":
        counts = share_metrics()  # noqa: F841 - the folder goes when this does

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm-ext")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    logging_args = ["--logging-config.formatter", "json"] if endpoint.log_format == "json" else []
    args = parser.parse_args([command.name, served.model, *vllm_args, *logging_args])
    configure_logging_from_args(args)
    check_arguments(args, served.checkpoint, endpoint.allow_code)
    if overrides:
        if callable(args.hf_overrides):
            raise UsageError("--hf-overrides beside a plan must be a JSON object")
        args.hf_overrides = {**(args.hf_overrides or {}), **overrides}
    if not args.uds:
        args.host = args.host or DEFAULT_HOST  # vLLM would listen on every interface
    args.api_key = keys or None
    apply(endpoint, args)
    if endpoint.metrics_port is not None:
        serve_metrics(args.host or DEFAULT_HOST, endpoint.metrics_port)
    try:
        command.validate(args)
        command.cmd(args)
    except (ValueError, TypeError) as error:  # vLLM refuses bad settings with these while it is configured
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            raise
        raise UsageError(one_line(error)) from error
    if not stopping.told:
        sys.exit(1)  # its engine died, and vLLM would say that all went well


def read_keys(file: Path | None) -> list[str]:
    """The keys in a file, one a line; blank lines and those that begin with # are none.

    Raises:
        UsageError: for a file that cannot be read or has no key.

    """
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file}: cannot be read ({error}); write one key a line") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {file}: it has no key; write one key a line")
    return keys


def allow_plugin() -> None:
    """Name this plugin in `VLLM_PLUGINS`, beside all those that would load without it.

    Raises:
        UsageError: where the user set it and left this plugin out.

    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        names = {plugin.name for group in DEFAULT_GROUPS for plugin in entry_points(group=f"vllm.{group}_plugins")}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {PLUGIN}))
    elif PLUGIN not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS={allowed!r} leaves this plugin out; add {PLUGIN} to it or unset it")


def check_arguments(args: argparse.Namespace, checkpoint: Checkpoint, allow_code: bool) -> None:
    """Raise UsageError for a key on the command line, and for what would run code from the checkpoint."""
    if args.api_key:
        raise UsageError("--api-key: whoever lists processes would see it; use --api-key-file, or VLLM_API_KEY")
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
    if checkpoint.folder is None and args.load_format == "auto":
        args.load_format = "safetensors"  # what a hub holds is not known yet, and vLLM would fall back to pickle


def apply(endpoint: Endpoint, args: argparse.Namespace) -> None:
    """Turn our settings into vLLM's."""
    settings = endpoint.settings.model_copy(update={"own_metrics_port": endpoint.metrics_port is not None})
    setattr(args, ARGUMENT, settings)
    args.middleware = [*args.middleware, MIDDLEWARE]
    args.enable_request_id_headers = False  # ours are always on
    if settings.max_output_tokens is not None:  # for requests that name no number
        overrides = {"max_new_tokens": settings.max_output_tokens}
        args.override_generation_config = overrides | (args.override_generation_config or {})
    if settings.max_n is not None:
        os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(settings.max_n))
    if args.shutdown_timeout == 0:
        args.shutdown_timeout = int(settings.drain_seconds)


def several_processes(vllm_args: Sequence[str]) -> bool:
    """Whether vLLM will start several API servers: it takes one for each data-parallel engine by itself."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--api-server-count", "-asc", type=int, default=1)
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    args = parser.parse_known_args(vllm_args)[0]
    return bool(max(args.api_server_count, args.data_parallel_size) > 1)


def share_metrics() -> tempfile.TemporaryDirectory[str] | None:
    """Let several processes count, in files: prometheus-client reads this when it is first imported.

    Returns the folder, which is removed with the object; None where the user named one.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return None
    counts = tempfile.TemporaryDirectory(prefix="vllm-ext-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts.name
    return counts


def serve_metrics(host: str, port: int) -> None:
    """Serve `/metrics` on a port of its own, from a thread of this process.

    Raises:
        UsageError: where that port is taken.

    """
    from prometheus_client import start_http_server
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    try:
        start_http_server(port, host, get_prometheus_registry())
    except OSError as error:
        raise UsageError(f"--metrics-port {port}: cannot listen ({error.strerror}); choose another") from error


def check_listening(vllm_args: Sequence[str]) -> None:
    """Raise UsageError where the port is taken: vLLM shares a listening port and would not notice."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--uds")
    args = parser.parse_known_args(vllm_args)[0]
    if args.uds:
        return
    if not 0 < args.port < 2**16:
        raise UsageError(f"--port {args.port}: no such port; choose one of 1-65535")
    # A server that is still starting holds its port without listening, which only a strict bind notices. That one also
    # minds the connections of a server that has ended, for a minute.
    lingering = any(
        connection.laddr.port == args.port and connection.status == psutil.CONN_TIME_WAIT
        for connection in psutil.net_connections("tcp")
    )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, lingering)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"--port {args.port}: cannot listen on {args.host} ({error.strerror}); choose another"
        ) from error
