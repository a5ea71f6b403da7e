"""How values, errors and instants are put into words. Pure: the time zone is handed in.

Called by view, steps, text and html.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine.events import ErrorInfo, Payload
from pyworkflow_ray.observability.model import ErrorView, ValueView

SHORT = 60  # characters of a value that are shown; more is named by its size
ARGUMENT = 24  # characters of the argument that tells equal steps apart

GLYPHS = {
    "completed": "✓",
    "failed": "✗",
    "cancelled": "⊘",
    "retrying": "⟳",
    "parked": "⏸",
    "paused": "!",
    "stuck": "!",
    "waiting": "·",
    "running": "▶",
    "pending": "·",
    "queued": "·",
    "lost": "↯",
}

# What stands for a glyph where the stream's encoding has no such character.
ASCII = str.maketrans(
    {
        "✓": "+", "✗": "x", "⊘": "-", "⟳": "~", "⏸": "=", "▶": ">", "·": ".", "↯": "!", "▓": "#", "░": "-", "█": "O",
        "▒": ":", "┊": "|", "│": "|", "╱": "/", "–": "-", "×": "x", "…": "...", "→": "->", "≥": ">=", "≤": "<=",
    }
)  # fmt: skip


def instant(at: float) -> dt.datetime:
    """The aware UTC datetime of a UNIX time."""
    return dt.datetime.fromtimestamp(at, dt.UTC)


def ago(seconds: float) -> str:
    return "now" if seconds < 0.0005 else f"{format_duration(seconds)} ago"


def clock(at: dt.datetime, now: dt.datetime, tz: dt.tzinfo, *, zone: bool = False) -> str:
    """The time of day, in `tz`; with the date where that is another day than `now`."""
    local, today = at.astimezone(tz), now.astimezone(tz)
    text = local.strftime("%H:%M:%S")
    if local.date() != today.date():
        text = local.strftime("%a %d %b " if local.year == today.year else "%Y-%m-%d ") + text
    return f"{text} {local.tzname()}" if zone else text


def when(at: dt.datetime, now: dt.datetime, tz: dt.tzinfo) -> str:
    """ "in 3m 12s (21:14:07)", or "due 4s ago (21:14:07)"."""
    left = (at - now).total_seconds()
    relative = f"in {format_duration(left)}" if left > 0 else "due now" if left > -1 else f"due {ago(-left)}"
    return f"{relative} ({clock(at, now, tz)})"


def short_name(name: str) -> str:
    """ "checkout" for "shop.flows:checkout"; a name that was given explicitly stays as it is."""
    return name.rpartition(":")[2].rpartition(".")[2] if ":" in name else name


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str) -> str:
    return " ".join(text.split())


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def size_text(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def payload_value(payload: Payload) -> Any:
    """The value where it is stored as JSON (a model's fields), else a text that stands for it."""
    if payload.ref is None and payload.enc in ("json", "model") and not payload.redacted:
        return payload.data
    return payload_text(payload)


def payload_text(payload: Payload) -> str:
    """The whole value on one line, where the log holds it readable; else its preview, or type and size."""
    if payload.redacted:
        return one_line(payload.preview or "[redacted]")
    if payload.ref is None and payload.enc == "json":
        return json.dumps(payload.data, ensure_ascii=False)
    if payload.ref is None and payload.enc == "model":
        name = _class_name(payload)
        if isinstance(payload.data, dict):
            fields = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in payload.data.items())
            return f"{name}({fields})"
        return f"{name}({json.dumps(payload.data, ensure_ascii=False)})"
    if payload.preview is not None:
        return one_line(payload.preview)
    if payload.enc == "custom":
        return f"(encrypted, {size_text(payload.size)})"
    return f"<{_class_name(payload)}, {size_text(payload.size)}>"


def _class_name(payload: Payload) -> str:
    return (payload.cls or "value").rpartition(":")[2].rpartition(".")[2] or "value"


def value_view(payload: Payload, limit: int = SHORT) -> ValueView:
    whole = payload_text(payload)
    complete = len(whole) <= limit and payload.ref is None and not payload.redacted
    return ValueView(
        text=cut(whole, limit), complete=complete, size=payload.size, type=payload.cls, redacted=payload.redacted
    )


def input_views(args: list[Payload], kwargs: dict[str, Payload]) -> list[ValueView]:
    named = [(name, value_view(payload)) for name, payload in kwargs.items()]
    return [value_view(p) for p in args] + [v.model_copy(update={"text": f"{name}={v.text}"}) for name, v in named]


def argument_text(args: list[Payload], kwargs: dict[str, Payload]) -> str | None:
    """The first argument, short: it tells steps of one name apart."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return None if first is None else cut(payload_text(first).strip('"'), ARGUMENT)


def error_view(info: ErrorInfo, count: int = 1) -> ErrorView:
    where = None
    if info.where is not None:
        where = f"{info.where.file}:{info.where.line} in {info.where.function}"
    return ErrorView(
        kind=info.kind, type=info.type, message=info.message, where=where, traceback=info.traceback, count=count
    )


def collapse(errors: list[ErrorView]) -> list[ErrorView]:
    """Equal errors (kind, type, message, place) become one with a count, in the order first seen."""
    counted: dict[tuple[str, str, str, str | None], ErrorView] = {}
    for error in errors:
        key = (error.kind, error.type, error.message, error.where)
        seen = counted.get(key)
        total = error.count + (seen.count if seen else 0)
        counted[key] = (seen or error).model_copy(update={"count": total})
    return list(counted.values())
