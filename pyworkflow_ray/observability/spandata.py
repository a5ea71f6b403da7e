"""A finished span as plain data: what a run's log, or a worker's spool, holds of it until it is sent.

Pure. Made by `trace` (from events) and `current` (from users' spans); `spans` makes OpenTelemetry's own of it. Times
are whole nanoseconds since 1970, ids hexadecimal, so that a span written down and read again is the same span.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyworkflow_ray.ids import attempt_span_id as attempt_span_id
from pyworkflow_ray.ids import run_span_id as run_span_id
from pyworkflow_ray.ids import step_span_id as step_span_id

SpanStatus = Literal["unset", "ok", "error"]
SpanEvent = tuple[str, int, dict[str, Any]]  # name, time, attributes
SpanLink = tuple[str, str, dict[str, Any]]  # trace id, span id, attributes


@dataclass(slots=True)
class SpanData:
    """One span that has ended.

    parent_id: None for a root. remote_parent: the parent is another service's, or of this run's caller.
    resource, scope: of the process and library that made it; None for those derived from a log.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start: int
    end: int
    attributes: dict[str, Any] = field(default_factory=dict)
    status: SpanStatus = "unset"
    description: str = ""
    events: list[SpanEvent] = field(default_factory=list)
    links: list[SpanLink] = field(default_factory=list)
    kind: str = "INTERNAL"
    remote_parent: bool = False
    resource: dict[str, Any] | None = None
    scope: tuple[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Its fields, not copied (`dataclasses.asdict` copies deeply, which costs ten times as much)."""
        return {name: getattr(self, name) for name in self.__slots__}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), separators=(",", ":"), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> SpanData:
        data = json.loads(text)
        for name in ("events", "links"):
            data[name] = [tuple(item) for item in data[name]]
        if data["scope"] is not None:
            data["scope"] = tuple(data["scope"])
        return cls(**data)


def ns(at: float) -> int:
    return round(at * 1e6) * 1000  # microseconds are all that a float of seconds since 1970 holds


def plain_attributes(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Those that a span may carry as they are; others as text. None is left out."""
    return {
        f"{prefix}{name}": value if isinstance(value, (str, bool, int, float)) else str(value)
        for name, value in given.items()
        if value is not None
    }
