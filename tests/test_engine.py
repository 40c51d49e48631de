"""An engine's process without an engine: what it tells, how it fails, and that it ends with the block."""

import os
import subprocess
import sys
import time

import pytest

from tests.test_process import alive
from vllm_ext.engine import Engine
from vllm_ext.errors import UsageError


def echo(connection, asked):
    """Says what it was told, until that is 0."""
    while asked:
        connection.send(asked)
        asked = connection.recv()


def refuse(connection, asked):
    raise ValueError(f"{asked} is\ntoo much")


def fail(connection, asked):
    raise RuntimeError(asked)


def die(connection, asked):
    print("ValueError: the last words")
    os._exit(asked)


def leave(connection, asked):
    """Goes on for ever, with a child that does too."""
    connection.send(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


def test_tells_until_it_has_done():
    with Engine(f"{__name__}:echo") as engine:
        for message in ({"asked": 1}, "more", 0):
            engine.send(message)
            assert engine.receive() == (message or None)


@pytest.mark.parametrize(
    ("work", "asked", "told", "shown"),
    [
        (refuse, 7, "^7 is too much$", False),
        (fail, "no memory", r"^the engine failed \(RuntimeError: no memory\); the end of its log is above$", True),
        (die, 3, r"^an engine ended with code 3 \(ValueError: the last words\); the end of its log is above$", True),
    ],
)
def test_fails_in_one_line(work, asked, told, shown, capfd):
    with Engine(f"{__name__}:{work.__name__}") as engine:
        engine.send(asked)
        with pytest.raises(UsageError, match=told):
            engine.receive()
    assert bool(capfd.readouterr().err) == shown


def test_ends_with_all_that_it_started():
    with Engine(f"{__name__}:leave") as engine:
        engine.send(None)
        child = engine.receive()
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} outlived its engine")
