"""Keeps secrets and control characters out of what a command prints: errors, warnings, logs and tracebacks."""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

from datamodules.output_text import printable
from datamodules.redaction import redact_text

#: loggers of libraries that print colours, which contain control characters
COLOURED = ("transformers",)


def shown(value: Any, newlines: bool = False) -> str:
    """Returns text that may be printed: without secrets, and with control characters as escape sequences.

    Args:
        value: its ``str`` is used.
        newlines: whether to keep line breaks.
    """
    return printable(redact_text(str(value)), newlines=newlines)


def protect_output() -> None:
    """Applies :func:`shown` to logs, warnings and tracebacks, and makes every character printable.

    A stream whose encoding lacks a character writes an escape sequence for it instead of raising UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if getattr(logging.getLogRecordFactory(), "protected", False):
        return
    logging.setLogRecordFactory(_protected_records(logging.getLogRecordFactory()))
    warnings.formatwarning = _protected_warnings(warnings.formatwarning)
    sys.excepthook = _print_exception


def _protected_records(create: Any) -> Any:
    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = create(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the message: logging would print them as they are
            message, record.args = f"{record.msg} {record.args!r}", None
            record.msg = message
        safe = redact_text(message) if record.name.startswith(COLOURED) else shown(message, newlines=True)
        if safe != message:
            record.msg, record.args = safe, None
        if record.exc_info and record.exc_info[0] is not None:
            text = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = shown(text, newlines=True).rstrip("\n")  # logging.Formatter prints it if it is set
        return record

    factory.protected = True  # type: ignore[attr-defined]
    return factory


def _protected_warnings(format_warning: Any) -> Any:
    def formatted(*args: Any, **kwargs: Any) -> str:
        return shown(format_warning(*args, **kwargs), newlines=True)

    return formatted


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(shown(text, newlines=True))
