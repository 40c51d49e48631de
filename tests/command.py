"""The `vllm-ext` command in this process, since one of its own takes ten seconds to import what is here already."""

import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import pytest

from serving.run_folder import FOLDER
from serving.supervisor import SUPERVISOR
from vllm_ext.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command left behind; the names are subprocess's."""

    returncode: int
    stdout: str
    stderr: str


def vllm_ext(*arguments: object) -> Done:
    """Run the command; the environment and what SIGTERM does are as before when it ends."""
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            TemporaryDirectory() as folder,
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            patch.setattr(sys, "argv", ["vllm-ext", *map(str, arguments)])
            patch.setenv(SUPERVISOR, str(os.getppid()))  # or a server would be looked for in another process
            patch.setenv(FOLDER, folder)
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGTERM, handler)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def refused(*arguments: object) -> str:
    """Run the command; returns its one line of complaint."""
    return complaint(vllm_ext(*arguments))


def complaint(done: Done) -> str:
    """The one line in which a command, here or in a process of its own, said what to mend."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(complaints) == 1, done.stderr
    return complaints[0]
