"""A request's id on every line that is logged while it is served.

The id is put on the record itself, so that JSON lines have it as `request_id`; lines of text get it at their end.
"""

import logging

from asgi_correlation_id import correlation_id
from pythonjsonlogger.json import JsonFormatter

LOGGERS = ("vllm", "uvicorn", "uvicorn.error", "uvicorn.access")


class _RequestId(logging.Filter):
    """Puts the id of the request that is being served on a record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (value := correlation_id.get()) is not None:
            record.request_id = value
        return True


class _WithRequestId(logging.Formatter):
    """Formats as `formatter` does, and adds the id."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        line = self.formatter.format(record)
        value = getattr(record, "request_id", None)
        return line if value is None else f"{line} request_id={value}"


def install() -> None:
    """Put ids on the lines of vLLM's and uvicorn's loggers; call it once both are configured."""
    for handler in {handler for name in LOGGERS for handler in logging.getLogger(name).handlers}:
        handler.addFilter(_RequestId())
        if handler.formatter is not None and not isinstance(handler.formatter, JsonFormatter):
            handler.setFormatter(_WithRequestId(handler.formatter))
