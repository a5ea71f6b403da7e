"""The log lines of a run: what its owner says as events are first recorded, at the level of the failure taxonomy.

Pure but for the logger that is handed in. Called by `runtime.active_run` with new events only, never with those that it
replays: a line appears once. Rules:

* a failed attempt: transient INFO, timeout WARNING, permanent ERROR; a cascade's refusals are counted, not logged;
* a step that gives up, and a worker or owner that is lost: WARNING; a run that failed: ERROR (of a cascade CRITICAL,
  which `execution.hooks` says);
* equal failures of one step are said for attempts 1, 2, 4, 8 ...: a step retried for ever does not fill the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.words import one_line, short_name

LEVELS = {
    "transient": logging.INFO,
    "permanent": logging.ERROR,
    "timeout": logging.WARNING,
    "cascade": logging.DEBUG,
}


class Narrator:
    """The lines of one run in one activation."""

    def __init__(self, created: ev.RunCreated, log: logging.Logger) -> None:
        self._created = created
        self._log = log
        self._about: dict[str, Any] = {
            "run": created.run_id,
            "workflow": created.workflow,
            "trace_id": created.trace_id or None,
            "attributes": created.attributes,
        }
        self._names: dict[str, str] = {}
        self._same: dict[tuple[str, str, str], int] = {}  # (position, type, message): how often

    def remember(self, events: Iterable[ev.Event]) -> None:
        """Learn the names of the steps that earlier activations scheduled; nothing is said of them."""
        for event in events:
            if isinstance(event, ev.StepScheduled | ev.MapScheduled):
                self._names[event.position] = short_name(event.step)

    def tell(self, event: ev.Event) -> None:
        """Say what there is to say of a new event."""
        match event:
            case ev.StepScheduled() | ev.MapScheduled():
                self._names[event.position] = short_name(event.step)
            case ev.AttemptFailed():
                self._attempt_failed(event)
            case ev.AttemptsFailed():
                for one in event.each():
                    self._attempt_failed(one)
            case ev.StepLost():
                self._say(logging.WARNING, f"its worker was lost ({event.cause.replace('_', ' ')})", event.position)
            case ev.StepFailed() if event.why in ("exhausted", "deadline", "lost"):
                text = f"failed for good ({event.why}): {event.error.type}: {one_line(event.error.message)}"
                self._say(logging.WARNING, text, event.position, event.attempt)
            case ev.RunActivated():
                self._activated(event)
            case ev.RunFailed() if event.error.kind != "cascade":
                self._say(logging.ERROR, f"failed: {event.error.type}: {one_line(event.error.message)}")
            case ev.RunCancelled():
                self._say(logging.INFO, "was cancelled" + (f": {event.reason}" if event.reason else ""))
            case ev.RunParked():
                self._say(logging.DEBUG, "is parked")
            case ev.RunCompleted():
                self._say(logging.DEBUG, "completed")

    def _activated(self, event: ev.RunActivated) -> None:
        if event.cause == "recovery":
            self._say(logging.WARNING, f"goes on in epoch {event.epoch}: its owner was lost")
        elif event.cause == "resume":
            self._say(logging.INFO, f"is resumed, in epoch {event.epoch}")

    def _attempt_failed(self, event: ev.AttemptFailed) -> None:
        error = event.error
        key = (event.position, error.type, error.message)
        times = self._same[key] = self._same.get(key, 0) + 1
        if times & (times - 1):
            return  # said at 1, 2, 4, 8 ...
        again = f" (same error {times}×)" if times > 1 else ""
        text = f"attempt {event.attempt} failed: {error.type}: {one_line(error.message)}{again}"
        if event.delay_s is not None:
            text += f"; next in {format_duration(round(event.delay_s, 3))} ({event.delay_reason})"
        self._say(LEVELS[error.kind], text, event.position, event.attempt)

    def _say(self, level: int, text: str, position: str | None = None, attempt: int | None = None) -> None:
        if not self._log.isEnabledFor(level):
            return
        about = dict(self._about)
        where = f"run {self._created.run_id}"
        if position is not None:
            about["step"] = self._names.get(position) or self._names.get(position.partition("[")[0], "")
            about["attempt"] = attempt
            where += f", step {about['step'] or position}"
        self._log.log(level, "%s: %s", where, text, extra=about)
