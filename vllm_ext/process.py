"""Processes of their own: started, waited for, and ended with all that they started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import httpx
from rich.console import Console

from vllm_ext.errors import UsageError

START_SECONDS = 600
STOP_SECONDS = 60  # a supervised server ends by itself in 45
LOG_LINES = 30
# An exception as Python or vLLM's logger ends a traceback with it; not one that a warning merely speaks of.
RAISED = re.compile(r"(?:^|\] )(\w+Error: .*)")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A command that runs for as long as the block, with its log kept."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> None:
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the block
        # A session of its own, so that its workers can be found, and Ctrl-C here reaches it through us alone.
        self.popen = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, pass_fds=pass_fds, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """Its id, which is its group's too."""
        return self.popen.pid

    def wait(self, seconds: float) -> int | None:
        """Its exit code, if it ends within that time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.popen.wait(seconds)
        return None

    def show_end(self) -> str:
        """Print the end of the log on stderr; returns what was raised first in it, in parentheses after a space."""
        self.log.seek(0)
        return show_end(self.log.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        """End what is still running, and what it started."""
        self.popen.terminate()
        self.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()
        self.log.close()


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[str]:
    """Run `command`, a server on that loopback port, for as long as the block; gives its URL once it is healthy.

    Raises:
        UsageError: where it does not come up; the end of its log is printed.

    """
    url = f"http://127.0.0.1:{port}"
    with Process(command) as server:
        end = time.monotonic() + START_SECONDS
        while not _healthy(url):
            code = server.wait(0.5)
            if code is None and time.monotonic() < end:
                continue
            why = f"not in {START_SECONDS} s" if code is None else f"it exited with code {code}"
            raise UsageError(f"the server did not start: {why}{server.show_end()}; the end of its log is above")
        yield url


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False


def show_end(log: str) -> str:
    """Print the end of a log on stderr; returns what was raised first in it, in parentheses after a space, if any."""
    lines = [line for line in log.splitlines() if line.strip()]
    Console(stderr=True, highlight=False).print("\n".join(lines[-LOG_LINES:]), markup=False)
    return next((f" ({match[1]})" for line in lines if (match := RAISED.search(line))), "")
