"""vLLM's own OpenAI-compatible server, with a plan laid over a stock checkpoint, in this process.

vLLM's options stay vLLM's. Ours set its plugins, its middleware and its log format, and refuse what would run code from
a checkpoint or show a key to whoever lists processes. Everything that can be known beforehand is checked first, so that
a mistake costs a line and not a start.
"""

import os
from collections.abc import Sequence
from importlib.metadata import entry_points

from serving import run_folder
from serving.key_file import read_keys
from serving.settings import ServerSettings
from vllm_ext.errors import UsageError, one_line
from vllm_ext.noise import end_quietly, held
from vllm_ext.served import Served
from vllm_ext.versions import PLUGIN

# Plugins of these groups load unless VLLM_PLUGINS leaves them out; endpoints load only where it names them.
DEFAULT_GROUPS = ("general", "io_processor", "platform", "stat_logger")
JSON_LOG = {"text": (), "json": ("--logging-config.formatter", "json")}
MULTIPLE = "PROMETHEUS_MULTIPROC_DIR"
# vLLM refuses bad settings with these while it is configured; OSError is a file, or a hub that does not answer.
CONFIGURED = (ValueError, TypeError, KeyError, AssertionError, NotImplementedError, OSError)


def serve(served: Served, vllm_args: Sequence[str], settings: ServerSettings, options: Sequence[str] = ()) -> None:
    """Serve until stopped; `options` are the names of our own, which a mistyped one is compared with.

    Raises:
        UsageError: for whatever a user can mend; what vLLM itself refuses included.

    """
    keys = read_keys(settings.api_key_file)
    allow_plugin()
    if served.head.kind != "stock":
        share_metrics()
    debug = os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG"
    with held(UsageError, enabled=not debug):
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from yaml import YAMLError

        from serving import arguments

        try:
            args = arguments.parse(served.model, [*vllm_args, *JSON_LOG[settings.log_format]], options)
            arguments.prepare(args, served, settings, keys)
            arguments.check_config(args)
        except UsageError:
            raise
        except (*CONFIGURED, YAMLError) as error:
            if debug:
                raise
            raise UsageError(one_line(error)) from error
        if arguments.api_servers(args) > 1:
            share_metrics()
        if settings.metrics_port is not None:
            serve_metrics(args.host or arguments.DEFAULT_HOST, settings.metrics_port)
    if args.headless:  # engines without an API server, which mind signals as vLLM has it
        run_folder.tell_ready()
    try:
        ServeSubcommand.cmd(args)
    except (ValueError, TypeError) as error:  # as a chat template that cannot be read
        if debug:
            raise
        raise UsageError(one_line(error)) from error
    end_quietly()


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


def share_metrics() -> None:
    """Let several processes count, in files, unless the user named a folder for them.

    prometheus-client reads this when it is first imported, so a process that counts itself must be told before.
    """
    if MULTIPLE not in os.environ:
        os.environ[MULTIPLE] = str(run_folder.make("metrics"))


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
