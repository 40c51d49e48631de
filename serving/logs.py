"""A request's id on every line that is logged while it is served.

The id is put on the record itself, so that JSON lines have it as `request_id`; lines of text get it at their end.
"""

import logging
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

LOGGERS = ("vllm", "uvicorn", "uvicorn.error", "uvicorn.access")


class _RecordFactory:
    """Makes records as `factory` does, with the id of the request that is being served."""

    def __init__(self, factory: Any) -> None:
        self.factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = self.factory(*args, **kwargs)
        if (value := request_id.get()) is not None:
            record.request_id = value
        return record


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
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _RecordFactory):
        logging.setLogRecordFactory(_RecordFactory(factory))
    for handler in {handler for name in LOGGERS for handler in logging.getLogger(name).handlers}:
        if handler.formatter is not None and not isinstance(handler.formatter, JsonFormatter | _WithRequestId):
            handler.setFormatter(_WithRequestId(handler.formatter))
