"""What a circuit breaker is declared with, and how that travels: options in JSON types.

Used by `breaker` (the machine) and by all who declare, compare and configure breakers; calls `durations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pyworkflow_ray.durations import parse_duration

LONGEST_OPEN_S = 3600.0  # where recovery_backoff grows the open time and no limit is given


def full_name(name: str, key: str | None) -> str:
    """How a breaker is called where one text must do: "payments", or "payments[host-7]" for a key of it."""
    return name if key is None else f"{name}[{key}]"


def split_name(full: str) -> tuple[str, str | None]:
    """Name and key; a name holds no bracket."""
    name, bracket, key = full.partition("[")
    return (name, key[:-1]) if bracket and key.endswith("]") else (full, None)


def options_for(known: Mapping[str, dict[str, Any]], full: str | None) -> dict[str, Any] | None:
    """The options of a breaker, or of the one that it is a key of, among those that travel with a run."""
    return None if full is None else known.get(full) or known.get(split_name(full)[0])


_ALWAYS_SAID = ("failure_threshold", "recovery_timeout")
CODE = ("code", "since")  # where the declaration comes from: no options, and not compared


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Compared between all who use a breaker's name. Spans are seconds.

    failure_threshold: consecutive counted failures that open it, ≥ 1 (default 5); unused where failure_rate is set.
    recovery_timeout: how long it stays open before a call may probe (default 60).
    failure_rate, slow_call_rate: share of the window's calls, in (0, 1], at or above which it opens.
    slow_call_duration: a call that takes as long or longer is slow; without slow_call_rate a slow call is a failure.
    minimum_calls: rates are judged from so many calls in the window on.
    window: an int: the last n calls; a float: seconds.
    min_nodes: failures must come from so many nodes before it opens for all.
    half_open_max_calls: calls that may probe at the same time. success_threshold: probes that must succeed.
    max_recovery_timeout, recovery_backoff: each failed probe in a row multiplies the open time, up to the limit.
    ramp: seconds in which a closed breaker goes from a trickle back to every call; None: at once.
    counts: names of what counts in place of the taxonomy; the functions themselves stay in their process.
    code: identity of the code that declares it, "" where nobody knows; since: when that was made, UNIX time.
    """

    failure_threshold: int = 5
    recovery_timeout: float = 60.0
    failure_rate: float | None = None
    slow_call_duration: float | None = None
    slow_call_rate: float | None = None
    minimum_calls: int = 10
    window: int | float = 60.0
    min_nodes: int = 1
    half_open_max_calls: int = 1
    success_threshold: int = 1
    max_recovery_timeout: float | None = None
    recovery_backoff: float = 1.0
    ramp: float | None = None
    counts: str | None = None
    code: str = field(default="", compare=False)
    since: float = field(default=0.0, compare=False)

    @property
    def windowed(self) -> bool:
        """Whether successes matter even where nothing has failed: rates are shares of all calls."""
        return self.failure_rate is not None or self.slow_call_rate is not None

    def open_time(self, failed_probes: int) -> float:
        """How long it stays open after `failed_probes` probes failed in a row. Finite for any number."""
        limit = self.max_recovery_timeout
        if limit is None:
            limit = max(self.recovery_timeout, LONGEST_OPEN_S) if self.recovery_backoff > 1 else self.recovery_timeout
        open_s = self.recovery_timeout
        for _ in range(failed_probes):
            if open_s >= limit or self.recovery_backoff <= 1 or open_s == 0:
                break
            open_s *= self.recovery_backoff
        return min(open_s, limit)

    def as_declared(self) -> dict[str, Any]:
        """`as_options`, and where the declaration comes from: so it travels to other processes."""
        return {**self.as_options(), **({"code": self.code, "since": self.since} if self.code else {})}

    def as_options(self) -> dict[str, Any]:
        """The constructor's options, in JSON types. Defaults are left out."""
        options: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in CODE:
                continue
            if one.name in _ALWAYS_SAID or value != one.default:
                options[one.name] = value
        if isinstance(self.window, float) and "window" in options:
            options["window"] = f"{self.window:f}s"  # as text: a bare number would be calls
        return options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> BreakerSettings:
        known = {one.name for one in fields(cls)}
        given = {name: value for name, value in options.items() if name in known}
        if isinstance(given.get("window"), str):
            given["window"] = float(parse_duration(given["window"]))
        return cls(**given)

    def with_options(self, changes: Mapping[str, Any]) -> BreakerSettings:
        return replace(self, **changes)

    def conflict(self, other: BreakerSettings) -> tuple[str, Any, Any] | None:
        """The first option that differs, with our value and the other's; None where all agree."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if mine != theirs and one.name not in CODE:
                return one.name, mine, theirs
        return None

    def replaces(self, other: BreakerSettings) -> bool:
        """Whether this is declared by a newer version of the code that declares `other`."""
        return bool(self.code) and bool(other.code) and self.code != other.code and self.since > other.since
