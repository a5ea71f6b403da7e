"""Alerts of a run, folded from its events. Pure: events in, alerts out.

Called by the observer process. Rules:

* an alert follows from one event, and its id from the run and that event: reading a log again gives the same alerts;
* a run is struggling when a step of it has failed so often and is tried again, or when its owner was lost so often
  without a step completed: once a step, and once until a step completes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from typing import Any

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.words import one_line, short_name

STRUGGLING_AFTER = 3
Body = dict[str, Any]


class AlertFold:
    """The alerts of one run, event by event. Each is a JSON object, with the fields of `execution.alerts.Alert`."""

    def __init__(self, created: ev.RunCreated, struggling_after: int = STRUGGLING_AFTER) -> None:
        self._created = created
        self._after = struggling_after
        self._names: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._owners_lost = 0
        self._out: list[Body] = []

    def take(self) -> list[Body]:
        """Alerts since the last call."""
        taken, self._out = self._out, []
        return taken

    def apply(self, event: ev.Event) -> None:
        match event:
            case ev.StepScheduled() | ev.MapScheduled():
                self._names[event.position] = short_name(event.step)
            case ev.AttemptFailed() if event.delay_s is not None:
                self._failed(event, 1, event.error)
            case ev.AttemptsFailed():
                self._failed(event, len(event.attempts), event.errors[-1])
            case ev.AttemptsCounted():
                self._failed(event, event.last - event.first + 1, None)
            case ev.StepCompleted():
                self._failures.pop(event.position, None)
                self._owners_lost = 0
            case ev.ChunkCompleted():
                self._owners_lost = 0
            case ev.StepFailed():
                if event.why == "exhausted":
                    step = self._name(event.position)
                    text = f"step {step} has no attempt left after {event.attempt}"
                    self._tell("attempts_exhausted", event, text, event.error, step=step)
            case ev.RunPaused() if event.reason == "step_exhausted":
                self._tell("attempts_exhausted", event, f"paused: {one_line(event.message)}", None)
            case ev.RunActivated() if event.cause == "recovery":
                self._owners_lost += 1
                if self._owners_lost == self._after:
                    text = f"is struggling: its owner was lost {self._owners_lost} times and no step was completed"
                    self._tell("run_struggling", event, text, None)
            case ev.RunFailed():
                of = self._name(event.position) if event.position else None
                self._tell("run_failed", event, "failed" + (f" of step {of}" if of else ""), event.error, step=of)

    def _failed(self, event: Any, number: int, error: ev.ErrorInfo | None) -> None:
        before = self._failures[event.position]
        self._failures[event.position] = now = before + number
        if before < self._after <= now:
            step = self._name(event.position)
            text = f"is struggling: step {step} has failed {now} times and is tried again"
            self._tell("run_struggling", event, text, error, step=step)

    def _name(self, position: str) -> str:
        return self._names.get(position) or self._names.get(position.partition("[")[0]) or position

    def _tell(self, what: str, event: ev.Event, text: str, error: ev.ErrorInfo | None, **about: Any) -> None:
        created = self._created
        message = None if error is None else one_line(error.message)
        if error is not None:
            text += f": {error.type}: {message}"
        body: Body = {
            "id": alert_id(created.run_uid, what, event.seq),
            "what": what,
            "at": dt.datetime.fromtimestamp(event.at, dt.UTC).isoformat(),
            "text": f"run {created.run_id} ({short_name(created.workflow)}) {text}",
            "run_id": created.run_id,
            "workflow": created.workflow,
            "kind": None if error is None else error.kind,
            "error_type": None if error is None else error.type,
            "message": message,
            "trace_id": created.trace_id or None,
            "attributes": created.attributes,
            **about,
        }
        self._out.append({name: value for name, value in body.items() if value is not None})


def breaker_opened(name: str, key: str | None, generation: int, reason: str, at: float) -> Body:
    """The alert that a breaker, or a key of one, has opened."""
    full = name if key is None else f"{name}[{key}]"
    body: Body = {
        "id": alert_id(name, key, "breaker_opened", generation),
        "what": "breaker_opened",
        "at": dt.datetime.fromtimestamp(at, dt.UTC).isoformat(),
        "text": f"circuit breaker {full} opened: {reason}",
        "breaker": name,
        "key": key,
        "message": reason,
    }
    return {field: value for field, value in body.items() if value is not None}


def alert_id(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(("alert", *map(str, parts))).encode()).hexdigest()[:32]
