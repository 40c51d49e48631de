"""The process that owns a server: it starts it, passes signals on to it, and sees to it that all of it ends.

vLLM minds signals once it serves. While it starts, it may not notice that it was told to stop, or wait ten minutes for
an engine that has ended already. So the server is a process group of its own: until it is ready a signal ends all of it
at once, and after that it is given the time to drain.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from serving.run_folder import FOLDER, READY

SUPERVISOR = "SERVER_SUPERVISOR"
STOPPING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
WATCHED = {signal.SIGCHLD, signal.SIGALRM}
GRACE_SECONDS = 15
"""For vLLM to end by itself, after the time to drain."""
LEFTOVER_SECONDS = 2
"""For what a server leaves behind to end by itself, as the process that removes its shared memory."""
KILL_SECONDS = 5
SHARED_MEMORY = "/dev/shm/"
SOCKET_NAME, SOCKET_PATH = 37, 107
"""Characters that vLLM gives a socket's name, and that all of its path may have."""
# Of Linux's prctl.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def heard() -> set[signal.Signals]:
    """The signals that stop this program: all but those that who started it had it ignore, as nohup does."""
    return {number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN}


def end_at_once() -> None:
    """Let a signal end this process without a word, also where it is the first of a container."""
    for number in heard():
        signal.signal(number, lambda number, _: os._exit(128 + number))


def is_supervised() -> bool:
    """Whether this process is the server that a supervisor started."""
    return os.environ.get(SUPERVISOR) == str(os.getppid())


def obey() -> None:
    """Take signals as any program does, and drain if the supervisor is killed; call it first in the server."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING | WATCHED)


def supervise(drain_seconds: float) -> int:
    """Run this program once more as the server, until it ends; returns the exit status.

    It is the server's own; 1 where that ended well without having been told to, as when its engine died; and 128 and
    the signal's number where it was told while it started.
    """
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waited = heard() | WATCHED
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {FOLDER: folder, SUPERVISOR: str(os.getpid())}
        if len(folder) + SOCKET_NAME <= SOCKET_PATH:
            environment.setdefault("VLLM_RPC_BASE_PATH", folder)
        command = [sys.executable, *sys.orig_argv[1:]]
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        return _watch(server, waited, Path(folder) / READY, drain_seconds)


def _watch(server: subprocess.Popen[bytes], waited: set[signal.Signals], ready: Path, drain_seconds: float) -> int:
    """Wait for the server to end, or end it; either way nothing of it is left."""
    told = 0
    while server.poll() is None:
        number = signal.sigwait(waited)
        if number == signal.SIGCHLD:
            continue
        if number == signal.SIGALRM or not ready.exists():
            end_children()
            return 128 + (told or number)
        if not told:
            signal.setitimer(signal.ITIMER_REAL, drain_seconds + GRACE_SECONDS)
        told = number
        server.send_signal(number)
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=LEFTOVER_SECONDS)
    end_children()
    code = server.returncode if server.returncode >= 0 else 128 - server.returncode
    return code if told else code or 1


def end_children() -> None:
    """Kill all that descends from this process, and remove the shared memory that it used."""
    this, used = psutil.Process(), set()
    end = time.monotonic() + KILL_SECONDS
    while (children := this.children(recursive=True)) and time.monotonic() < end:
        for child in children:
            with suppress(psutil.Error):
                used |= {each.path for each in child.memory_maps() if each.path.startswith(SHARED_MEMORY)}
            with suppress(psutil.Error):
                child.kill()
        for child in children:
            with suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
        time.sleep(0.02)
    for path in map(Path, used):
        with suppress(OSError):
            if path.stat().st_ctime >= this.create_time():
                path.unlink()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
