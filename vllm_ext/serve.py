"""`vllm-ext serve`: vLLM's own OpenAI-compatible server, with a plan laid over a stock checkpoint.

Everything that can be known beforehand is checked first, so that a mistake costs a line and not a start.
"""

import argparse
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from model_executors.attention_plan import CONFIG_KEY, LayerPlan
from model_executors.head_plan import HeadPlan
from model_executors.head_plan import Kind as HeadKind
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.versions import vllm_problem

PLUGIN = "vllm_ext"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000  # vLLM's own


def serve(
    model: str,
    changes: Mapping[int, LayerPlan] | None,
    vllm_args: Sequence[str],
    head: HeadKind | None = None,
    agreement: float | None = None,
    words: Path | None = None,
) -> None:
    """Serve in the foreground until stopped; without `changes` and `head`, the checkpoint as it is.

    Raises:
        UsageError: for whatever a user can mend; what vLLM itself refuses included.

    """
    checkpoint, overrides = prepare(model, changes, vllm_args, head, agreement)
    if words is not None:
        from vllm_ext.spell.words import speculation, with_words

        overrides = with_words(checkpoint, overrides, words)
    check_listening(vllm_args)
    if problem := vllm_problem():
        raise UsageError(problem)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS={allowed!r} leaves this plugin out; add {PLUGIN} to it or unset it")

    if head_plan(checkpoint, head, agreement).kind != "stock" and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        # The head counts in the engine's process; prometheus-client reads this when it is first imported.
        counts = tempfile.TemporaryDirectory(prefix="vllm-ext-metrics-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = counts.name

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm-ext")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args([command.name, model, *vllm_args])
    if overrides:
        if callable(args.hf_overrides):
            raise UsageError("--hf-overrides beside a plan must be a JSON object")
        args.hf_overrides = {**(args.hf_overrides or {}), **overrides}
    if words is not None:
        if args.speculative_config:
            raise UsageError(f"--words {words}: it offers drafts itself; drop --speculative-config, or --words")
        args.speculative_config = speculation()
    if not args.uds:
        args.host = args.host or DEFAULT_HOST  # vLLM would listen on every interface
    try:
        command.validate(args)
        command.cmd(args)
    except (ValueError, TypeError) as error:  # vLLM refuses bad settings with these while it is configured
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            raise
        raise UsageError(one_line(error)) from error


def prepare(
    model: str,
    changes: Mapping[int, LayerPlan] | None,
    vllm_args: Sequence[str],
    head: HeadKind | None = None,
    agreement: float | None = None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Check the model and the plan; returns it, and what to override in its configuration: nothing without
    `changes` and `head`.

    Raises:
        UsageError: for a missing or damaged checkpoint, or a plan that does not fit.

    """
    checkpoint = Checkpoint.open(model, weights=False)
    plan = checkpoint.plan if changes is None else checkpoint.planned(changes)
    if checkpoint.folder is not None and not any(argument.startswith("--load-format") for argument in vllm_args):
        checkpoint.check_weights()
    chosen = head_plan(checkpoint, head, agreement)
    overrides = {} if changes is None or plan is None else checkpoint.overrides(plan)
    if head is None and agreement is None:
        return checkpoint, overrides
    if not overrides and plan is None:
        overrides = checkpoint.overrides(checkpoint.planned({}))
    section = {**checkpoint.config.get(CONFIG_KEY, {}), **overrides.get(CONFIG_KEY, {}), "head": chosen.to_config()}
    return checkpoint, {**overrides, CONFIG_KEY: section}


def head_plan(checkpoint: Checkpoint, head: HeadKind | None, agreement: float | None) -> HeadPlan:
    """The checkpoint's head, or another one in its place, with the threshold for `agreement`.

    Raises:
        UsageError: for character heads where there are none, or an agreement that was not calibrated for.

    """
    written = checkpoint.head
    if head is not None and head != written.kind:
        if head == "char":
            raise UsageError(f"--head char: {checkpoint.name} has no character heads; train them with vllm-ext spell")
        written = HeadPlan(head)
    if agreement is None:
        return written
    if written.kind != "char":
        raise UsageError(f"--agreement {agreement:g}: it is for character heads; add --head char, or drop it")
    known = {row["agreement"]: row for row in checkpoint.config[CONFIG_KEY]["training"]["calibration"]}
    if agreement not in known:
        choices = ", ".join(f"{each:g}" for each in sorted(known))
        raise UsageError(f"--agreement {agreement:g}: {checkpoint.name} was calibrated for {choices}; take one of them")
    return replace(written, threshold=known[agreement]["threshold"])


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


def one_line(error: Exception) -> str:
    """The message without the frame that pydantic puts around it."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("ctx", {}).get("error", item["msg"])) for item in errors())
    return " ".join(str(error).split())
