"""The log: structlog events on stderr, coloured lines on a terminal and one JSON object per line elsewhere.

Facts of the call being served are added from its context variable when an event is written, not bound when the call
begins: most calls write no event at all.
"""

import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from corral.rpc.context import current_call
from corral.rpc.errors import InvalidArgument

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("auto", "console", "json")


def configure(log_format: str, level: str) -> None:
    """Set up structlog, and send what libraries log through it. Raises InvalidArgument."""
    if log_format not in FORMATS:
        raise InvalidArgument(f"there is no log format {log_format!r}; known are {', '.join(FORMATS)}")
    if level not in LEVELS:
        raise InvalidArgument(f"there is no log level {level!r}; known are {', '.join(LEVELS)}")
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    structlog.configure(
        processors=[
            add_call,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *_rendering(console),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # asyncio reports slow callbacks as warnings, and they are why somebody turned debugging on.
    logging.basicConfig(handlers=[_FromLogging()], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def _rendering(console: bool) -> list[Any]:
    if console:
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    return [structlog.processors.format_exc_info, as_json]


_to_json = json.JSONEncoder(default=str).encode


def as_json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """The line. structlog's own makes an encoder for each."""
    return _to_json(event)


def add_call(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add who caused the event; keys given with the event win."""
    call = current_call.get()
    if call is not None:
        event.setdefault("namespace", call.namespace)
        event.setdefault("request_id", call.request_id)
        if call.method:
            event.setdefault("rpc", call.method)
    return event


class _FromLogging(logging.Handler):
    """Hands records of the standard library's logging to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(
            record.levelno,
            "library.message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info or None,
        )
