"""The folder of one run of a server: made and removed by its supervisor, and known to all of its processes."""

import os
from pathlib import Path

FOLDER = "SERVER_RUN_FOLDER"  # vLLM warns of names that begin as its own
READY = "ready"


def make(name: str) -> Path:
    """A folder in it."""
    folder = Path(os.environ[FOLDER]) / name
    folder.mkdir(exist_ok=True)
    return folder


def tell_ready() -> None:
    """Leave word that an API server minds signals itself now, where a supervisor waits for that."""
    if FOLDER in os.environ:
        (Path(os.environ[FOLDER]) / READY).touch()
