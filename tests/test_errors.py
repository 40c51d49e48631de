"""A mistake, and what the system refuses, is one line on stderr and exit code 2."""

import errno
import os
import subprocess
import sys

import pytest

from vllm_ext.errors import UsageError, os_line, told_in_one_line

FULL = "No space left on device"
PRINTS = r"""
from vllm_ext.errors import told_in_one_line
with told_in_one_line():
    print("1.5\N{MULTIPLICATION SIGN}")
"""


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (UsageError("--rank 9: give less"), "error: --rank 9: give less\n"),
        (OSError(errno.ENOSPC, FULL, "/x/y"), "error: /x/y: no space left on device; free some space"),
        (OSError(errno.ENOSPC, FULL), "error: the system: no space left on device; free some space"),
        (OSError("only words"), "error: the system: only words\n"),
    ],
)
def test_one_line(raised, told, capsys):
    with pytest.raises(SystemExit, match="2"), told_in_one_line():
        raise raised
    err = capsys.readouterr().err
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_our_own_faults_have_a_traceback(monkeypatch):
    with pytest.raises(TypeError), told_in_one_line():
        raise TypeError
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    with pytest.raises(OSError, match="why"), told_in_one_line():
        raise OSError(errno.EACCES, "why")


def test_a_name_beside_the_reason():
    assert os_line(OSError(errno.ENOTDIR, "Not a directory"), "--out x/y") == (
        "--out x/y: not a directory; a file stands where a folder is needed; choose another"
    )


def test_a_terminal_that_knows_ascii_alone():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", PRINTS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1.5?\n"
