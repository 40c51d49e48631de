"""What is wrong with something a user typed or handed over, and how it is told: one line, and exit code 2."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllm_ext.noise import end_quietly

CURES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "files may not be so large there; choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose one that you may use",
    errno.EPERM: "choose one that you may use",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another",
    errno.EEXIST: "something else stands there; choose another",
    errno.EISDIR: "a folder stands where a file is needed; choose another",
    errno.ENOENT: "choose one that exists, or make it",
}


class UsageError(ValueError):
    """One line with the name, the value and the fix; `vllm-ext` prints it and exits with code 2.

    One it stays where a name, or the error of a library, that it was made with has line ends.
    """

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.splitlines()))


def one_line(error: Exception) -> str:
    """The message in one line, without the frame that pydantic puts around it."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("ctx", {}).get("error", item["msg"])) for item in errors())
    return " ".join(str(error).split())


def os_line(error: OSError, name: object = None) -> str:
    """What the operating system refused, in one line: the file or folder `name`, why, and what to do."""
    why = error.strerror or one_line(error)
    cure = CURES.get(error.errno or 0)
    return f"{name or error.filename or 'the system'}: {why[0].lower()}{why[1:]}" + (f"; {cure}" if cure else "")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the process with exit code 2 and one line on stderr where a user's mistake, or the system, stops the block.

    With VLLM_LOGGING_LEVEL=DEBUG the traceback of what the system refused is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where a terminal cannot show a sign, it shows another
            stream.reconfigure(errors="replace")
    try:
        yield
        return
    except UsageError as error:
        line = str(error)
    except OSError as error:
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            raise
        line = os_line(error)
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {line}", markup=False, style="red")
    end_quietly()
    sys.exit(2)


def run_tool(main: Callable[..., None], **context: bool) -> None:
    """Run a developers' tool, which is a module, with its options; a mistake is one line and exit code 2."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings=context)(main)
    with told_in_one_line():
        app()
