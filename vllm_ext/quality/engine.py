"""The work done by an engine in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_ext.errors import UsageError, one_line
from vllm_ext.process import STOP_SECONDS, show_end
from vllm_ext.quality.work import Replies, Work


@dataclass(frozen=True)
class Failure:
    """Why an engine gave no replies."""

    reason: str
    with_log: bool


def reply_of(
    vllm_args: Sequence[str],
    overrides: dict[str, Any],
    work: Work,
    with_prompts: bool,
    advance: Callable[[int], None],
) -> Replies:
    """Do the work in a process of its own.

    Raises:
        UsageError: where the engine does not start or does not finish.

    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("w+") as log:
        engine = context.Process(target=_engine, args=(sending, log.name, vllm_args, overrides, work, with_prompts))
        engine.start()
        sending.close()  # so that its end is seen here when the process ends
        message: Any = None
        try:
            while isinstance(message := receiving.recv(), int):
                advance(message)
        except EOFError:
            engine.join()
            message = Failure(f"the engine ended with exit code {engine.exitcode}; the end of its log is above", True)
        finally:
            assert engine.pid is not None
            if not isinstance(message, Replies | Failure):  # interrupted
                engine.terminate()
            engine.join(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)  # its workers
            engine.join()
        if isinstance(message, Failure):
            if message.with_log:
                show_end(log.read())
            raise UsageError(message.reason)
        assert isinstance(message, Replies)
        return message


def _engine(
    sending: Connection,
    log: str,
    vllm_args: Sequence[str],
    overrides: dict[str, Any],
    work: Work,
    with_prompts: bool,
) -> None:
    """The process: sends numbers of tokens done, and at last its replies or why there are none."""
    os.setsid()  # so that its workers can be found, and Ctrl-C in the terminal does not reach it
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm_ext.quality.scoring import reply

        sending.send(reply(vllm_args, overrides, work, with_prompts, sending.send))
    except SystemExit:  # vLLM's parser of options
        sending.send(Failure("vLLM does not take these options; its complaint is above", with_log=True))
    except ValueError as error:  # how vLLM refuses settings
        traceback.print_exc()
        sending.send(Failure(one_line(error), with_log=os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"))
    except Exception as error:
        traceback.print_exc()
        reason = f"the engine failed ({type(error).__name__}: {one_line(error)}); the end of its log is above"
        sending.send(Failure(reason, with_log=True))
