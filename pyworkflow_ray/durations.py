"""Durations: seconds as a number, a `timedelta`, or text such as "500ms", "30s", "5m", "2h", "1d", "1h30m".

Pure. Ours because pydantic refuses "30s" and the parsing libraries disagree about "5M" (durationpy is the oracle of
the tests for the texts both accept).
"""

from __future__ import annotations

import datetime as dt
import math
import re

Duration = int | float | str | dt.timedelta

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_MAX_S = 100 * 365 * 86400.0  # a century: beyond it a float of seconds is a mistake, and datetime overflows


def parse_duration(value: Duration) -> float:
    """Seconds in `value`.

    Raises:
        TypeError: `value` is no number, text or timedelta (a bool is none).
        ValueError: it is negative, not finite, longer than a century, or a text that is not understood.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str, dt.timedelta)):
        raise TypeError(f"a duration is seconds, a timedelta, or text such as '30s', not {type(value).__name__}")
    if isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _parse_text(value)
    else:
        if isinstance(value, int) and abs(value) > _MAX_S:
            raise ValueError(f"a duration of {value} s is longer than a century")
        seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"a duration must be finite, not {seconds}")
    if seconds < 0:
        raise ValueError(f"a duration must not be negative, not {seconds}")
    if seconds > _MAX_S:
        raise ValueError(f"a duration of {seconds} s is longer than a century")
    return seconds


def _parse_text(text: str) -> float:
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(
            f"{text!r} is no duration: write '500ms', '30s', '5m', '2h', '1d' or '1h30m' (units in lower case)"
        )
    units = [list(_UNITS_S).index(unit) for _, unit in parts]
    if units != sorted(set(units), reverse=True):
        raise ValueError(f"{text!r} is no duration: each unit once, the largest first")
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """`seconds` in at most two units, for people: "12ms", "4.1s", "3m 12s", "1d 21h"."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    for unit, size, below, below_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // below_size
            return f"{whole // size}{unit}" + (f" {rest}{below}" if rest else "")
    return f"{whole}s"
