"""Whatever moment a server is told to stop at, all of it ends: programs that stand for a server, and the real one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.servers import COMMAND, eventually
from vllm_ext.process import free_port

SHARED_MEMORY = Path("/dev/shm")
SECONDS = 10
# Who started the tests may ignore these, and so would their programs.
for _number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
PROGRAM = """
import multiprocessing, os, signal, sys, time
from multiprocessing import shared_memory
from serving import run_folder, supervisor

def deaf():
    held = shared_memory.SharedMemory(create=True, size=4096)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    print("engine", os.getpid(), held.name, flush=True)
    time.sleep(600)

def main():
    if not supervisor.is_supervised():
        supervisor.end_at_once()
        sys.exit(supervisor.supervise(drain_seconds=0))
    supervisor.obey()
    print("server", os.getpid(), flush=True)
    %s

main()
"""
STARTS = "deaf() if os.fork() == 0 else [signal.signal(15, signal.SIG_IGN), signal.signal(2, signal.SIG_IGN)]\n"
STARTS += "    time.sleep(600)"
SERVES = "signal.signal(15, lambda *_: sys.exit({code}))\n    run_folder.tell_ready()\n    print('ready', flush=True)\n"
SERVES += "    time.sleep(600)"


@pytest.fixture
def program(tmp_path):
    """Starts a program that does this as the server, and waits until it printed so many lines."""
    started = []

    def start(does: str, lines: int, **more) -> tuple[subprocess.Popen[str], list[list[str]]]:
        (tmp_path / "program.py").write_text(PROGRAM % does)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
        command = [sys.executable, str(tmp_path / "program.py")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True, **more
        )
        started.append(process)
        return process, [process.stdout.readline().split() for _ in range(lines)]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def tell(process: subprocess.Popen, number: int, group: bool) -> None:
    (os.killpg if group else os.kill)(process.pid, number)


@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_hears_nothing_while_it_starts_ends_at_once(program, tmp_path, number, group):
    """With an engine that hears nothing either, in a session of its own, and its shared memory."""
    process, lines = program(STARTS, 2)
    (_, server), (_, engine, shared) = sorted(lines, key=len)
    assert (SHARED_MEMORY / shared).exists()
    tell(process, number, group)
    assert process.wait(SECONDS) == 128 + number
    assert not psutil.pid_exists(int(server))
    assert not psutil.pid_exists(int(engine))
    assert not (SHARED_MEMORY / shared).exists()
    assert list(tmp_path.glob("vllm-ext-*")) == []


@pytest.mark.parametrize("code", [0, 3])
def test_a_server_that_serves_is_told_and_its_status_handed_on(program, code):
    process, _ = program(SERVES.format(code=code), 2)
    tell(process, signal.SIGTERM, False)
    assert process.wait(SECONDS) == code


@pytest.mark.parametrize(("does", "status"), [("sys.exit(0)", 1), ("sys.exit(2)", 2), ("os.abort()", 128 + 6)])
def test_a_server_that_ends_by_itself_has_failed(program, does, status):
    process, _ = program(does, 1)
    assert process.wait(SECONDS) == status


def test_a_server_whose_supervisor_is_killed_is_told(program):
    process, lines = program(SERVES.format(code=0), 2)
    process.kill()
    assert eventually(lambda: not psutil.pid_exists(int(lines[0][1])), SECONDS)


def test_a_signal_that_is_ignored_stays_so(program):
    """As under nohup, when the terminal is closed."""
    process, _ = program(SERVES.format(code=0), 2, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    tell(process, signal.SIGHUP, True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    tell(process, signal.SIGTERM, True)
    assert process.wait(SECONDS) == 0


@pytest.mark.nightly
def test_a_server_that_does_not_drain_in_time_is_ended(program):
    from serving.supervisor import GRACE_SECONDS

    deaf = SERVES.format(code=0).replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
    process, _ = program(deaf, 2)
    tell(process, signal.SIGTERM, False)
    assert process.wait(GRACE_SECONDS + SECONDS) == 128 + signal.SIGTERM


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Where vLLM's sockets have room for their names."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize(
    ("moment", "number", "group"),
    [
        ("begins", signal.SIGTERM, True),
        ("has a server", signal.SIGINT, True),
        ("importing", signal.SIGTERM, False),
        ("Starting to load model", signal.SIGTERM, True),
        pytest.param("Starting to load model", signal.SIGINT, False, marks=pytest.mark.nightly),
        ("Warming up model", signal.SIGTERM, False),
        pytest.param("Warming up model", signal.SIGINT, True, marks=pytest.mark.nightly),
    ],
)
def test_vllm_ends_at_every_moment_of_its_start(tiny_models, tmp_path, short_folder, moment, number, group):
    """Before and while it is imported, while weights load, and while it compiles and warms up."""
    port = free_port()
    options = ["--port", port, "--skip-tokenizer-init", "--max-model-len", 256]
    command = [*COMMAND, tiny_models("Llama"), *options]
    environment = os.environ | {"TMPDIR": short_folder, "VLLM_LOGGING_LEVEL": "INFO"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command)], stdout=log, stderr=log, start_new_session=True, env=environment
        )
    try:
        assert eventually(lambda: reached(process, moment, tmp_path / "log"), 240), (tmp_path / "log").read_text()
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        shared = {each.path for one in family for each in one.memory_maps() if each.path.startswith(str(SHARED_MEMORY))}
        tell(process, number, group)
        told = time.monotonic()
        # Before it has set anything up the signal itself ends it, which shells show as the same status.
        assert process.wait(SECONDS) in (128 + number, -number)
        assert [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
        assert time.monotonic() - told < SECONDS
        assert [path for path in shared if Path(path).exists()] == []
        assert list(Path(short_folder).glob("vllm-ext-*")) == []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reached(process: subprocess.Popen, moment: str, log: Path) -> bool:
    """Whether the start has come so far: to one of three moments, or to a line of the log."""
    assert process.poll() is None, log.read_text()
    children = psutil.Process(process.pid).children()
    match moment:
        case "begins":
            return True
        case "has a server":
            return bool(children)
        case "importing":
            return any(child.cpu_times().user > 2 for child in children)
    return moment in log.read_text()
