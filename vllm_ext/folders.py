"""Folders that are written whole or not at all, and files that are put into them without a tie to where they came from.

A file is cloned where the file system can (Btrfs, XFS: no time, no space, and writing to one never changes the other),
and copied elsewhere. It is never a link: what is appended to a planned checkpoint's chat template must not reach the
checkpoint that it was made from.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_ext.errors import UsageError, one_line, os_line

FICLONE = 0x40049409
"""From Linux's `linux/fs.h`."""
SPARE = 2**20
"""Bytes that a folder takes beside the files that are counted."""


def check_out(out: Path) -> None:
    """Raise UsageError where the folder to write exists already, or cannot be made."""
    if out.exists():
        raise UsageError(f"--out {out}: it exists already; choose another folder or remove it")
    above = _above(out)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"--out {out}: no folder can be made in {above}; choose another")


def check_space(out: Path, files: Sequence[Path]) -> None:
    """Raise UsageError where the files would not fit beside the folder to write."""
    above = _above(out)
    if any(_clones(file, above) for file in files[:1]):
        return
    needed, free = sum(file.stat().st_size for file in files) + SPARE, shutil.disk_usage(above).free
    if needed > free:
        raise UsageError(
            f"--out {out}: it takes {needed / 2**20:,.0f} MiB, and {above} has {free / 2**20:,.0f} left; free some "
            "space, or choose another folder"
        )


def check_file(option: str, file: Path) -> None:
    """Raise UsageError where the file that is written in the end could not be."""
    if not file.parent.is_dir():
        raise UsageError(f"{option} {file}: no such folder; create {file.parent}")
    if file.is_dir():
        raise UsageError(f"{option} {file}: it is a folder; name a file in it")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{option} {file}: it cannot be written; choose another")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to build in, beside `folder`, that takes its name when all went well and is removed otherwise.

    Raises:
        UsageError: for what the system refuses to write.

    """
    from safetensors import SafetensorError

    building = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        building.chmod(0o755)
        yield building
        building.rename(folder)
    except BaseException as error:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, SafetensorError) and (code := re.search(r"(?:os error|code:) (\d+)", str(error))):
            raise UsageError(os_line(OSError(int(code[1]), os.strerror(int(code[1]))), folder)) from error
        if isinstance(error, OSError):
            raise UsageError(os_line(error, folder)) from error
        raise


def place(source: Path, target: Path) -> None:
    """Put the file there, readable by those who may read it where it lies, and writable by its owner."""
    source = source.resolve()  # a hub's cache holds links
    if not _clone(source, target):
        shutil.copyfile(source, target)
    as_readable(target, source)


def as_readable(file: Path, source: Path) -> None:
    """Let those who may read `source` read the file."""
    file.chmod(source.stat().st_mode & 0o777 | 0o600)


def _above(out: Path) -> Path:
    """The folder that would be written to first."""
    return next(folder for folder in out.absolute().parents if folder.exists())


def _clones(file: Path, folder: Path) -> bool:
    """Whether the file can be cloned into the folder."""
    with tempfile.NamedTemporaryFile(dir=folder) as trial:
        return _clone(file.resolve(), Path(trial.name))


def _clone(source: Path, target: Path) -> bool:
    """Let the two share their blocks until one is written to; False where the file system cannot."""
    with suppress(OSError), source.open("rb") as one, target.open("wb") as other:
        fcntl.ioctl(other.fileno(), FICLONE, one.fileno())
        return True
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        UsageError: for a file that cannot be read, or holds something else.

    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({one_line(error)}); download it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds no JSON object; download it again")
    return content
