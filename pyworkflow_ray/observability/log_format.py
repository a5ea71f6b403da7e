"""Log records as lines: text for people, JSON for machines. Any handler may use them.

Called by our worker processes, as `log_format` says, and by users for handlers of their own. What a record carries of
run, step, attempt, trace and the run's attributes (`execution.log_records`) is in both; arguments and results of steps
never are. A record that can't be formatted is a line that says so, not an error in the code that logs.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from typing import Any, Literal

LogFormat = Literal["text", "json"]
OURS = "pyworkflow_ray"
OUR_PREFIX = f"{OURS} "

_PLACE = ("run", "workflow", "step", "attempt", "trace_id", "span_id", "attributes")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", *_PLACE}


class TextFormatter(logging.Formatter):
    """`pyworkflow_ray WARNING: message  [run order-42, step charge, attempt 2]`; other loggers' lines begin with the
    level and their name."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{OUR_PREFIX}{record.levelname}" if is_ours(record) else f"{record.levelname} {record.name}"
        shown = [f"{name} {getattr(record, name)}" for name in ("run", "step", "attempt") if _has(record, name)]
        if record.name == f"{OURS}.run":
            shown = []  # the message begins with them
        text = f"{head}: {_message(record)}" + (f"  [{', '.join(shown)}]" if shown else "")
        trace = _traceback(self, record)
        return f"{text}\n{trace}" if trace else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, what is known of the place, and `extra` fields.

    Field names: `time level logger message run workflow step attempt trace_id span_id attributes error`; fields given
    as `extra` keep their names, with an underscore in front where one of these is taken.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        line.update({name: getattr(record, name) for name in _PLACE if _has(record, name)})
        trace = _traceback(self, record)
        if trace:
            line["error"] = trace
        for name, value in record.__dict__.items():
            if name not in _STANDARD and not name.startswith("_ray"):  # Ray puts its own on every record
                line[f"_{name}" if name in line else name] = value
        return json.dumps(line, default=str, ensure_ascii=False)


def make_formatter(name: LogFormat) -> logging.Formatter:
    return JsonFormatter() if name == "json" else TextFormatter()


def is_our_line(line: str) -> bool:
    """Whether one of our formatters made it, of a record of ours."""
    return line.startswith((OUR_PREFIX, '{"time": "'))


def is_ours(record: logging.LogRecord) -> bool:
    return record.name == OURS or record.name.startswith(f"{OURS}.")


def _has(record: logging.LogRecord, name: str) -> bool:
    return getattr(record, name, None) not in (None, "", {})


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:
        return f"{record.msg!r} (arguments do not fit: {error})"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    if record.exc_info and not record.exc_text:
        record.exc_text = formatter.formatException(record.exc_info)
    stack = formatter.formatStack(record.stack_info) if record.stack_info else ""
    return "\n".join(filter(None, (record.exc_text, stack)))
