"""What is wrong with something a user typed or handed over."""

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """One line with the name, the value and the fix; `vllm-ext` prints it and exits with code 2."""


def one_line(error: Exception) -> str:
    """The message in one line, without the frame that pydantic puts around it."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("ctx", {}).get("error", item["msg"])) for item in errors())
    return " ".join(str(error).split())


def run_tool(main: Callable[..., None]) -> None:
    """Run a developers' tool, which is a module, with its options; a mistake is one line and exit code 2."""
    import typer

    try:
        typer.run(main)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
