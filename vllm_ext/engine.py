"""vLLM's engine in a process of its own, which does what it is asked and tells of it, for `bench` and `quality`.

The process is a fresh interpreter with one engine and nothing else (`python -m vllm_ext.engine`), so that steps can be
timed one by one, and that its memory is given back when it ends. Its log is kept, and shown where it fails.
"""

import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from vllm_ext import openmp
from vllm_ext.errors import UsageError, one_line
from vllm_ext.process import STOP_SECONDS, Process
from vllm_ext.served import Served

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

DEFAULTS = {
    # By itself vLLM would take nearly all memory for the KV cache of a CPU.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Failure:
    """Why an engine gave no answer."""

    reason: str
    with_log: bool


class Engine(Process):
    """A process that calls `work`, as `module:function`, with a connection to this one and what is first sent."""

    def __init__(self, work: str) -> None:
        self.connection, other = Pipe()
        environment = DEFAULTS | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, "-m", "vllm_ext.engine", work, str(other.fileno())]
        super().__init__(command, openmp.preloading(environment), [other.fileno()])
        other.close()  # so that its end is seen here when the process ends

    def send(self, message: Any) -> None:
        """Say something; where it has ended, `receive` tells."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Wait for what it tells; None once it has done its work.

        Raises:
            UsageError: where it failed; the end of its log is printed unless vLLM said what is wrong.

        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            if not (code := self.wait(STOP_SECONDS)):
                return None
            raise UsageError(
                f"an engine ended with code {code}{self.show_end()}; the end of its log is above"
            ) from None
        if isinstance(message, Failure):
            if message.with_log:
                self.show_end()
            raise UsageError(message.reason)
        return message

    def __exit__(self, *unused: object) -> None:
        self.connection.close()
        super().__exit__()


def engine_args(served: Served, vllm_args: Sequence[str]) -> "EngineArgs":
    """What an engine is made from: the options of `vllm serve`, for that model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", served.model, *vllm_args]))
    if overrides := served.hf_overrides():
        args.hf_overrides = {**(args.hf_overrides or {}), **overrides}
    return args


def main() -> None:
    """The process: do the work, or say why it cannot be done."""
    work, descriptor = sys.argv[1:]
    with Connection(int(descriptor)) as connection:
        try:
            pkgutil.resolve_name(work)(connection, connection.recv())
        except SystemExit:  # vLLM's parser of options
            connection.send(Failure("vLLM does not take these options; its complaint is above", with_log=True))
        except ValueError as error:  # how vLLM refuses settings
            traceback.print_exc()
            connection.send(Failure(one_line(error), with_log=os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"))
        except Exception as error:
            traceback.print_exc()
            reason = f"the engine failed ({type(error).__name__}: {one_line(error)}); the end of its log is above"
            connection.send(Failure(reason, with_log=True))


if __name__ == "__main__":
    from vllm_ext import engine

    engine.main()  # what it sends is of the module that this process was imported as elsewhere
