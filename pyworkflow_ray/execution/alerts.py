"""Alerts as users see them: `pw.on_alert` and the `Alert` that it is given.

Registered here, as the hooks are; called in a process of its own by the observer, which keeps alerts until they are
delivered (`runtime.alerts`). Unlike a hook, a callback that raises or dies is called again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from pyworkflow_ray.engine.calls import Codec
from pyworkflow_ray.engine.events import RunCreated
from pyworkflow_ray.execution.hooks import load_hooks, register_hook

AlertKind = Literal["run_failed", "run_struggling", "attempts_exhausted", "breaker_opened"]
F = TypeVar("F", bound=Callable[[Any], Any])


@dataclass(slots=True, frozen=True)
class Alert:
    """Something a person should know of.

    Attributes:
        id: The same each time this alert is delivered, and of no other: whoever must not act twice keeps it.
        what: "run_failed"; "run_struggling": a step has failed `alert_struggling_after` times and is tried again, or
            the run was recovered so often without a step completed; "attempts_exhausted": a step has no attempt left;
            "breaker_opened".
        at: When it happened.
        text: In words, one line.
        kind, error_type, message: Of the error, where there is one. attributes: Of the run.
    """

    id: str
    what: AlertKind
    at: dt.datetime
    text: str
    run_id: str | None = None
    workflow: str | None = None
    step: str | None = None
    breaker: str | None = None
    key: str | None = None
    kind: str | None = None
    error_type: str | None = None
    message: str | None = None
    trace_id: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def on_alert(callback: F) -> F:
    """Call `callback(alert)` for each alert of the runs that are started from now on. Usable as a decorator.

    Called at least once an alert, in a process of its own with the run's code environment, and again, with growing
    pauses, as long as it raises or dies: a kill -9 of whoever delivers loses nothing. It gets `CALL_S` (60 s). Alerts
    of breakers go to the callbacks of the run that was started last. It travels with a run as hooks do (`on_retry`).

    Raises:
        ConfigurationError: it is no plain function.
    """
    return register_hook("alert", callback)


def alert_of(body: Mapping[str, Any]) -> Alert:
    """From its JSON."""
    known = {one.name for one in fields(Alert)}
    given = {name: value for name, value in body.items() if name in known}
    return Alert(**{**given, "at": dt.datetime.fromisoformat(str(body["at"]))})


def call_back(created: RunCreated, body: Mapping[str, Any], codec: Codec) -> None:
    """Call the callbacks that the run took along.

    Raises:
        LookupError: one can't be loaded here. Whatever a callback raises.
    """
    refs = created.hooks.get("alert", [])
    found = load_hooks(refs, codec.decode)
    alert = alert_of(body)
    for callback in found:
        callback(alert)
    if len(found) < len(refs):
        raise LookupError(f"{len(refs) - len(found)} of {len(refs)} callbacks can't be loaded here")
