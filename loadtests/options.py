"""Settings become options: a dataclass's field is declared once; Locust's command line and ours take it from there."""

import argparse
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar, get_args, get_type_hints

S = TypeVar("S")


class Parser(argparse.ArgumentParser):
    """One whose complaints are a ValueError, in one line."""

    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **given)

    def error(self, message: str) -> Any:
        """Refuse.

        Raises:
            ValueError: always.

        """
        raise ValueError(message)


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass's field that is an option; `more` goes to argparse."""
    return field(default=default, metadata={"help": text} | more)


def add_options(parser: Any, of: type, leave_out: Iterable[str] = (), **defaults: Any) -> None:
    """Let `parser`, or a group of it, have the fields of a dataclass as options, with other `defaults` where given."""
    hints = get_type_hints(of)
    for each in _options(of):
        if each.name in leave_out:
            continue
        more = dict(each.metadata)
        default = defaults.get(each.name, None if each.default is MISSING else each.default)
        kind = hints[each.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (one for one in get_args(kind) if one is not type(None))
        if kind is bool:
            more["action"] = "store_true"
        else:
            more["type"] = kind if kind in (int, float) else str
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        if kind is not bool and default not in (None, ""):
            more["help"] += f" Default: {shown}."
        more["help"] = more["help"].replace("%", "%%")
        if "choices" not in more and kind is not bool:
            more.setdefault("metavar", {int: "N", float: "X"}.get(kind, "TEXT"))
        parser.add_argument("--" + each.name.replace("_", "-"), default=default, **more)


def read_options(given: Any, of: type[S], **more: Any) -> S:
    """The dataclass with what was given on the command line, or for fields that are no options there, as in `more`."""
    found = {each.name: getattr(given, each.name) for each in _options(of) if hasattr(given, each.name)}
    return of(**found | more)


def arguments(*settings: Any, **more: Any) -> list[str]:
    """As a command line has them; what is empty is left out, since nothing here has another default that is empty."""
    values = {each.name: getattr(one, each.name) for one in settings for each in _options(type(one))} | more
    named = {name.replace("_", "-"): value for name, value in values.items()}
    flags = {name: value for name, value in named.items() if value is not None and value is not False and value != ""}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def _options(of: type) -> list[Field[Any]]:
    return [each for each in fields(of) if "help" in each.metadata]
