"""A server's process that fails to start, and one that leaves a child behind."""

import sys
import time
from pathlib import Path

import pytest

from vllm_ext.errors import UsageError
from vllm_ext.process import free_port, running

WARNING = "This can cause fd limit errors like `OSError: [Errno 24] Too many open files`. Consider increasing"
PARENT = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


@pytest.mark.parametrize(
    "line", ["ValueError: too little", "(Worker pid=7) ERROR 11-23 03:11:10 [executor.py:953] ValueError: too little"]
)
def test_names_what_was_raised_and_not_what_a_warning_speaks_of(line):
    code = f"import sys; print({WARNING!r}); print({line!r}); print('RuntimeError: see above'); sys.exit(3)"
    named = r"exited with code 3 \(ValueError: too little\)"
    with pytest.raises(UsageError, match=named), running([sys.executable, "-c", code], free_port()):
        pass


def test_ends_what_the_server_started(tmp_path):
    port = free_port()
    with running([sys.executable, "-c", PARENT, str(port), str(tmp_path / "pid")], port):
        child = int((tmp_path / "pid").read_text())
        assert alive(child)
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} outlived its server")


def alive(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
