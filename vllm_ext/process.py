"""A server as a process of its own: started, waited for, and ended with all that it started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from rich.console import Console

from vllm_ext.errors import UsageError

START_SECONDS = 600
STOP_SECONDS = 30
LOG_LINES = 30
# An exception as Python or vLLM's logger ends a traceback with it; not one that a warning merely speaks of.
RAISED = re.compile(r"(?:^|\] )(\w+Error: .*)")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[str]:
    """Run `command`, a server on that loopback port, for as long as the block; gives its URL once it is healthy.

    Raises:
        UsageError: where it does not come up; the end of its log is printed.

    """
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        # A session of its own, so that its workers can be found, and Ctrl-C here reaches it through us alone.
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(server, url, log)
            yield url
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    """Return when the server is healthy."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    log.seek(0)
    cause = show_end(log.read())
    why = f"not in {START_SECONDS} s" if server.returncode is None else f"it exited with code {server.returncode}"
    raise UsageError(f"the server did not start: {why}{cause}; the end of its log is above")


def show_end(log: str) -> str:
    """Print the end of a log on stderr; returns what was raised first in it, in parentheses after a space, if any."""
    lines = [line for line in log.splitlines() if line.strip()]
    Console(stderr=True, highlight=False).print("\n".join(lines[-LOG_LINES:]), markup=False)
    return next((f" ({match[1]})" for line in lines if (match := RAISED.search(line))), "")
