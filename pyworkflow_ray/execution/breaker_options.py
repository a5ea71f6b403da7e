"""Checks of a circuit breaker's options: of its constructor, and of `configure()`.

Called by the public `CircuitBreaker` and by the CLI; calls `resilience.breaker_settings`.
"""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.breakers import counting
from pyworkflow_ray.resilience.breaker_settings import CODE, BreakerSettings

OPTIONS = tuple(field.name for field in fields(BreakerSettings) if field.name not in CODE)
MAX_WINDOW_CALLS = 1_000_000
_RATES = ("failure_rate", "slow_call_rate")
_WHOLE = ("failure_threshold", "minimum_calls", "min_nodes", "half_open_max_calls", "success_threshold")
_SPANS = ("recovery_timeout", "slow_call_duration", "max_recovery_timeout", "ramp")
_OPTIONAL = (*_RATES, "slow_call_duration", "max_recovery_timeout", "ramp", "counts")


def checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as fields of BreakerSettings: numbers, seconds; `counts` as its name.

    Raises:
        ConfigurationError: an option is unknown or its value not allowed.
    """
    return {option: _checked(option, value) for option, value in given.items()}


def checked_settings(given: Mapping[str, Any]) -> BreakerSettings:
    """The settings that a constructor's options make.

    Raises:
        ConfigurationError: an option is unknown, its value not allowed, or two don't go together.
    """
    settings = BreakerSettings(**checked_options(given))
    check_together(settings)
    return settings


def check_together(settings: BreakerSettings) -> None:
    """Raises ConfigurationError where options that are allowed alone don't go together."""
    if settings.slow_call_rate is not None and settings.slow_call_duration is None:
        raise ConfigurationError(
            f"CircuitBreaker(slow_call_rate={settings.slow_call_rate:g}) needs slow_call_duration: how long a slow "
            "call takes"
        )
    if settings.windowed and isinstance(settings.window, int) and settings.minimum_calls > settings.window:
        raise ConfigurationError(
            f"CircuitBreaker(minimum_calls={settings.minimum_calls}, window={settings.window}): the window never holds "
            "so many calls, and the breaker would never open; make minimum_calls at most the window"
        )
    longest = settings.max_recovery_timeout
    if longest is not None and longest < settings.recovery_timeout:
        raise ConfigurationError(
            f"CircuitBreaker(max_recovery_timeout={longest:g}): allowed is recovery_timeout "
            f"({settings.recovery_timeout:g} s) or longer"
        )


def _checked(option: str, value: Any) -> Any:
    if option not in OPTIONS:
        near = difflib.get_close_matches(option, OPTIONS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(OPTIONS)}"
        raise ConfigurationError(f"CircuitBreaker has no option {option!r} (value {value!r}): {hint}")
    if value is None and option in _OPTIONAL:
        return None
    if option in _WHOLE:
        return value if _is_whole(value) and value >= 1 else _refuse(option, value, "a whole number ≥ 1")
    if option in _RATES:
        allowed = _is_number(value) and 0 < value <= 1
        return float(value) if allowed else _refuse(option, value, "a share above 0, at most 1, or None")
    if option in _SPANS:
        span = _span(option, value)
        return span if span > 0 or option == "recovery_timeout" else _refuse(option, value, "a duration above 0")
    if option == "window":
        return _window(value)
    if option == "recovery_backoff":
        return float(value) if _is_number(value) and 1 <= value < 1e6 else _refuse(option, value, "a number ≥ 1")
    if isinstance(value, str):  # counts, as settings that travel have it
        return value
    try:
        return counting(value)[1]
    except TypeError as error:
        return _refuse(option, value, str(error).removeprefix("allowed are ").removeprefix("allowed is "))


def _window(value: Any) -> int | float:
    if _is_whole(value):
        if not 1 <= value <= MAX_WINDOW_CALLS:
            _refuse("window", value, "1 to 1000000 calls")
        return int(value)
    if isinstance(value, (str, dt.timedelta)):
        span = _span("window", value)
        if span <= 0:
            _refuse("window", value, "a duration above 0")
        return span
    raise _refused("window", value, "a duration as text or timedelta, or a whole number: the last n calls")


def _span(option: str, value: Any) -> float:
    try:
        return float(parse_duration(value))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"CircuitBreaker({option}={value!r}): {error}") from None


def _refuse(option: str, value: Any, allowed: str) -> Any:
    raise _refused(option, value, allowed)


def _refused(option: str, value: Any, allowed: str) -> ConfigurationError:
    return ConfigurationError(f"CircuitBreaker({option}={value!r}): allowed is {allowed}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
