"""Logs: structured log lines that leave through the standard library's logging.

Nothing is printed unless the process configures logging: standard output belongs to the user, in a
command with ``--json`` and in a notebook. Warnings and errors go to standard error then, as those
of every library.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    import structlog

_FIELDS = "structured"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger that takes an event and its fields, by the name of a standard logger."""
    return cast("structlog.stdlib.BoundLogger", _Logger(name))


def configure(stream: TextIO, written: Callable[[], None] | None = None) -> None:
    """Log readable lines to a stream: ours from INFO on, everyone else's warnings.

    In a file, which may hold days, a line's time has its date.

    Args:
        stream: where to.
        written: called after each line of ours.
    """
    handler = logging.StreamHandler(stream) if written is None else _Handler(stream, written)
    handler.setFormatter(_Formatter(colors=stream.isatty(), dated=_is_file(stream)))
    ours = logging.getLogger("everstep")
    ours.setLevel(logging.INFO)
    ours.handlers = [handler]
    ours.propagate = False
    logging.basicConfig(level=logging.WARNING, stream=stream)


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False  # it has no descriptor


class _Logger:
    """A logger of structlog, which is imported for the first event: most commands log none."""

    def __init__(self, name: str) -> None:
        self._name = name

    @functools.cached_property
    def _logger(self) -> Any:
        import structlog

        return structlog.wrap_logger(
            logging.getLogger(self._name),
            processors=[structlog.stdlib.filter_by_level, _to_record],
            wrapper_class=structlog.stdlib.BoundLogger,
            context_class=dict,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)


def _to_record(
    _: Any, __: str, event: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """Turn an event into the arguments of a standard logger: a line, and the fields beside it."""
    exc_info = event.pop("exc_info", None)
    fields = (f"{name}={value!r}" for name, value in event.items() if name != "event")
    line = " ".join((str(event["event"]), *fields))
    return (line,), {"exc_info": exc_info, "extra": {_FIELDS: event}}


class _Handler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, and calls a function after each."""

    def __init__(self, stream: TextIO, written: Callable[[], None]) -> None:
        super().__init__(stream)
        self._written = written

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.StreamHandler.emit`."""
        super().emit(record)
        self._written()


class _Formatter(logging.Formatter):
    """Formats a record with its time, level and fields, in colours on a terminal."""

    def __init__(self, colors: bool, dated: bool) -> None:
        import structlog

        super().__init__()
        self._time = "%Y-%m-%d %H:%M:%S" if dated else "%H:%M:%S"
        self._render = structlog.dev.ConsoleRenderer(colors=colors)

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        event = dict(getattr(record, _FIELDS, {"event": record.getMessage()}))
        event["timestamp"] = self.formatTime(record, self._time)
        event["level"] = record.levelname.lower()
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return str(self._render(None, "", event))
