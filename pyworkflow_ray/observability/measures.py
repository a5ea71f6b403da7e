"""Metrics of a run, folded from its events. Pure: events in, measurements out, no OpenTelemetry.

Called by the observer process; `meters` gives what comes out to OpenTelemetry's instruments. Rules:

* each event is measured once, by whoever reads it first: a replay, a recovery and a killed process count nothing twice;
* attributes have few values: workflows, steps, breakers, outcomes, kinds; never run ids, messages or arguments.

`INSTRUMENTS` is the list that docs, dashboard and exporter are checked against.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.engine.chunks import parse_position
from pyworkflow_ray.observability.words import short_name

InstrumentKind = Literal["counter", "histogram", "gauge"]


class Instrument(NamedTuple):
    kind: InstrumentKind
    unit: str
    text: str
    bounds: tuple[float, ...] = ()


_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 14400, 86400)
_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

INSTRUMENTS: dict[str, Instrument] = {
    "pyworkflow.run.started": Instrument("counter", "{run}", "Runs that were submitted"),
    "pyworkflow.run.ended": Instrument("counter", "{run}", "Runs that ended, by outcome and by kind of error"),
    "pyworkflow.run.duration": Instrument("histogram", "s", "From submission to the end of a run", _SECONDS),
    "pyworkflow.run.unfinished": Instrument(
        "gauge", "{run}", "Unfinished runs by status, parked and paused ones among them"
    ),
    "pyworkflow.run.recoveries": Instrument("counter", "{recovery}", "Owners and workers that were lost, by cause"),
    "pyworkflow.run.recovery.duration": Instrument(
        "histogram", "s", "From the last word of a lost owner to the next owner's first", _SECONDS
    ),
    "pyworkflow.step.ended": Instrument("counter", "{step}", "Steps that ended, by outcome and why"),
    "pyworkflow.step.duration": Instrument("histogram", "s", "From a step's scheduling to its end", _SECONDS),
    "pyworkflow.step.attempts": Instrument("counter", "{attempt}", "Attempts by outcome and by kind of error"),
    "pyworkflow.step.attempt.duration": Instrument("histogram", "s", "Time that attempts took", _SECONDS),
    "pyworkflow.step.queue.duration": Instrument(
        "histogram", "s", "From a step's scheduling to its first attempt: waiting for a worker", _SECONDS
    ),
    "pyworkflow.step.retry.wait": Instrument(
        "histogram", "s", "Waits chosen before a next attempt, by reason", _SECONDS
    ),
    "pyworkflow.step.items": Instrument("counter", "{item}", "Items of maps by outcome"),
    "pyworkflow.breaker.refusals": Instrument("counter", "{refusal}", "Calls of steps that an open breaker refused"),
    "pyworkflow.breaker.state": Instrument("gauge", "1", "1 for the state that a breaker is in, 0 for the others"),
    "pyworkflow.breaker.failures": Instrument("gauge", "{failure}", "Failures that a breaker counts now"),
    "pyworkflow.breaker.transitions": Instrument("counter", "{transition}", "Changes of a breaker's state"),
    "pyworkflow.budget.tokens": Instrument("gauge", "{token}", "Tokens of a retry budget that no process holds"),
    "pyworkflow.budget.limit": Instrument("gauge", "{token}", "Tokens of a full retry budget"),
    "pyworkflow.journal.commit.duration": Instrument("histogram", "s", "From an append to its being durable", _FAST),
    "pyworkflow.alert.waiting": Instrument("gauge", "{alert}", "Alerts that are to be delivered"),
}


class Measure(NamedTuple):
    """One measurement: of a counter what is added, of a histogram what is recorded."""

    name: str
    value: float
    attributes: dict[str, Any]


@dataclass(slots=True)
class _Step:
    name: str
    since: float
    breaker: str | None
    began: bool = False
    dispatched: bool = True


@dataclass(slots=True)
class MeasureFold:
    """The measurements of one run, event by event; `status` is what the run is now."""

    created: ev.RunCreated
    status: str = "pending"
    _steps: dict[str, _Step] = field(default_factory=dict)
    _last_at: float = 0.0
    _out: list[Measure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last_at = self.created.at
        self._add("pyworkflow.run.started", 1)

    def take(self) -> list[Measure]:
        """Measurements since the last call."""
        taken, self._out = self._out, []
        return taken

    def apply(self, event: ev.Event) -> None:
        match event:
            case ev.RunActivated():
                if event.cause == "recovery":
                    self._add("pyworkflow.run.recoveries", 1, cause="run_actor_lost")
                    self._add("pyworkflow.run.recovery.duration", event.at - self._last_at)
                self.status = "running"
            case ev.RunParked():
                self.status = "parked"
            case ev.RunPaused():
                self.status = "paused"
            case ev.RunCompleted() | ev.RunFailed() | ev.RunCancelled():
                self._ended(event)
            case ev.StepScheduled() | ev.MapScheduled():
                self._steps[event.position] = _Step(short_name(event.step), event.at, event.breaker)
            case _:
                self._step_event(event)
        self._last_at = max(self._last_at, event.at)

    def _ended(self, event: ev.RunCompleted | ev.RunFailed | ev.RunCancelled) -> None:
        for position in list(self._steps):
            self._step_ended(position, event.at, "cancelled")
        error = getattr(event, "error", None)
        self.status = event.type.removeprefix("run_")
        why = {"kind": error.kind, "error.type": error.type} if isinstance(event, ev.RunFailed) and error else {}
        self._add("pyworkflow.run.ended", 1, outcome=self.status, **why)
        self._add("pyworkflow.run.duration", event.at - self.created.at, outcome=self.status)

    def _step_event(self, event: ev.Event) -> None:
        position = str(getattr(event, "position", ""))
        chunk = parse_position(position)
        position = chunk[0] if chunk is not None else position
        step = self._steps.get(position)
        if step is None:
            return
        match event:
            case ev.StepStarted():
                self._begun(step, event.started_at)
            case ev.AttemptFailed():
                self._attempt_failed(step, event)
            case ev.AttemptsFailed():
                for one in event.each():
                    self._attempt_failed(step, one)
            case ev.AttemptsCounted():
                for name, number in event.counts.items():
                    self._attempts(step, number, "failed", **{"error.type": name})
            case ev.StepHandedBack() if event.dispatch and not step.began and step.breaker:
                self._add("pyworkflow.breaker.refusals", 1, breaker=step.breaker)
            case ev.StepLost():
                self._attempts(step, 1, "lost")
                if event.cause != "run_actor_lost":
                    self._add("pyworkflow.run.recoveries", 1, cause=event.cause)
            case ev.StepCompleted():
                self._begun(step, event.started_at)
                self._attempts(step, 1, "succeeded")
                self._add("pyworkflow.step.attempt.duration", event.ended_at - event.started_at, step=step.name)
                self._step_ended(position, event.at, "completed")
            case ev.StepFailed():
                refused = event.why == "refused" or event.error.type == "CircuitOpenError"
                if refused and step.breaker:
                    self._add("pyworkflow.breaker.refusals", 1, breaker=step.breaker)
                self._step_ended(position, event.at, "failed", why=event.why, kind=event.error.kind)
            case ev.StepCancelled():
                self._step_ended(position, event.at, "cancelled")
            case ev.ChunkCompleted():
                self._chunk(step, event)

    def _begun(self, step: _Step, at: float) -> None:
        if not step.began:
            step.began = True
            self._add("pyworkflow.step.queue.duration", at - step.since, step=step.name)

    def _attempt_failed(self, step: _Step, event: ev.AttemptFailed) -> None:
        self._begun(step, event.started_at)
        self._attempts(step, 1, "failed", kind=event.error.kind, **{"error.type": event.error.type})
        self._add("pyworkflow.step.attempt.duration", event.ended_at - event.started_at, step=step.name)
        if event.delay_s is not None:
            reason = event.delay_reason or ""
            self._add("pyworkflow.step.retry.wait", event.delay_s, step=step.name, reason=reason)

    def _chunk(self, step: _Step, event: ev.ChunkCompleted) -> None:
        failed = len(event.failures)
        for outcome, number in (("succeeded", event.done - failed - len(event.waiting)), ("failed", failed)):
            if number:
                self._add("pyworkflow.step.items", number, step=step.name, outcome=outcome)
        for name, number in event.retried.items():
            self._attempts(step, number, "failed", **{"error.type": name})
        if event.last:
            self._step_ended(event.position, event.at, "completed")

    def _attempts(self, step: _Step, number: int, outcome: str, **attributes: Any) -> None:
        self._add("pyworkflow.step.attempts", number, step=step.name, outcome=outcome, **attributes)

    def _step_ended(self, position: str, at: float, outcome: str, **attributes: Any) -> None:
        step = self._steps.pop(position)
        self._add("pyworkflow.step.ended", 1, step=step.name, outcome=outcome, **attributes)
        self._add("pyworkflow.step.duration", at - step.since, step=step.name, outcome=outcome)

    def _add(self, name: str, value: float, **attributes: Any) -> None:
        about = {"workflow": short_name(self.created.workflow), **attributes}
        self._out.append(Measure(name, max(0, value), {_key(key): one for key, one in about.items()}))


def _key(name: str) -> str:
    return name if "." in name else f"pyworkflow.{name}"
