"""A machine that only puts load on others has neither torch nor vLLM."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "vllm", "transformers", "safetensors", "accelerate", "gguf")
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Absent())
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_of_loadtests_is_imported_without_torch():
    modules = [path.stem for path in (ROOT / "loadtests").glob("*.py") if path.stem != "__init__"]
    run("import loadtests.locustfile\n" + "".join(f"import loadtests.{each}\n" for each in modules))


def test_the_command_runs_without_torch():
    shown = run("from vllm_ext.cli.main import main\nsys.argv = ['vllm-ext', 'loadtest', 'compare', '--help']\nmain()")
    assert "--ttft" in shown


def test_what_a_worker_installs_has_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = " ".join([*project["dependencies"], *project["optional-dependencies"]["load"]])
    assert not [each for each in HEAVY if each in names.replace("vllm-ext", "")]


def test_locusts_help_has_our_options_with_their_defaults():
    command = [sys.executable, "-m", "loadtests", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    ours = " ".join(shown.split())
    assert "--workload {" in ours
    assert "Multiplies all lengths, for small models and machines. Default: 1." in ours
    assert "each user asks in turn; constant: as evenly as can be, lengths too. Default: closed." in ours
