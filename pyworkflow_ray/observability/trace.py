"""A run's trace, folded from its events. Pure: events in, finished spans out, no OpenTelemetry.

Called by `spans` and by the observer process; calls `spandata`. Rules:

* a span is told once, when the event that ends it is read, and never changed: what a prefix of the log gives is a
  prefix of what the whole log gives. Whoever sends spans needs to remember how many events it has read, nothing else;
* every span's parent is told too, at the latest when the run ends: what is open then ends with it;
* a failed run that is resumed gets a span of its own for its next life, below its root, for the root was told; so does
  a step that is begun or scheduled anew.

Attempts are told apart by their fence (epoch, dispatch, attempt). What a lost worker began is a span that ends, as an
error, when the loss was recorded; its epoch is that of its dispatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.engine.chunks import chunk_position, parse_position
from pyworkflow_ray.ids import span_id, trace_id
from pyworkflow_ray.observability.spandata import (
    SpanData,
    SpanEvent,
    SpanStatus,
    attempt_span_id,
    ns,
    plain_attributes,
    run_span_id,
    step_span_id,
)
from pyworkflow_ray.observability.words import short_name

Fence = tuple[int, int, int]


@dataclass(slots=True)
class _Open:
    """An attempt that has begun, as far as is known."""

    started_at: float
    worker: str = ""
    node: str = ""


@dataclass(slots=True)
class _Wait:
    """A step between two attempts, or before its breaker lets it through."""

    key: tuple[object, ...]
    name: str
    since: float
    attributes: dict[str, Any]


@dataclass(slots=True)
class _Step:
    """A step that has not ended. `told`, `known`: numbers of the last attempt that was told, and that is known of.
    `dispatched`: epoch, dispatch and time; None: no worker may have it. `late`: attempts that were told after
    they had been counted."""

    event: ev.StepScheduled | ev.MapScheduled
    began_at: float
    life: int = 0
    told: int = 0
    known: int = 0
    late: int = 0
    tries: int = 0
    lost: int = 0
    dispatched: tuple[int, int, float] | None = None
    running: dict[Fence, _Open] = field(default_factory=dict)
    wait: _Wait | None = None
    counted: list[ev.AttemptsCounted] = field(default_factory=list)
    error: ev.ErrorInfo | None = None
    total: int | None = None
    done: int = 0
    items_failed: int = 0


class TraceFold:
    """The trace of one run, event by event: `apply` each, `take` what has been finished by them."""

    def __init__(self, created: ev.RunCreated) -> None:
        self._created = created
        self._uid = created.run_uid
        self._trace = created.trace_id or trace_id(created.run_uid)
        self._parent = parent_of(created)
        self._common: dict[str, Any] = {
            "pyworkflow.run_id": created.run_id,
            "pyworkflow.workflow": created.workflow,
        }
        self._finished: list[SpanData] = []
        self._steps: dict[str, _Step] = {}
        self._ended_steps: dict[str, _Step] = {}  # those that a resume may begin anew
        self._lives: dict[str, int] = {}  # how often each step and timer was ended
        self._completions: dict[str, tuple[int, int, float]] = {}  # of each step: what a resume may tell again
        self._timers: dict[str, ev.TimerStarted] = {}
        self._life, self._life_at, self._life_cause = 0, created.at, ""
        self._epoch = 0
        self._last_at = created.at
        self._parked: ev.RunParked | ev.RunPaused | None = None
        self._ended = False
        self._retries = self._recoveries = 0
        self._marks: list[SpanEvent] = []  # on the run's own span: each time it was taken up again

    def take(self) -> list[SpanData]:
        """Spans that were finished since the last call."""
        taken, self._finished = self._finished, []
        return taken

    def apply(self, event: ev.Event) -> None:
        match event:
            case ev.RunActivated():
                self._activated(event)
            case ev.RunParked() | ev.RunPaused():
                self._parked = event
            case ev.RunCompleted() | ev.RunFailed() | ev.RunCancelled():
                self._run_ended(event)
            case ev.RunCancelRequested():
                self._mark("cancel_requested", event.at, {"cause": event.cause, "reason": event.reason})
            case ev.TimerStarted():
                self._timers[event.position] = event
            case ev.TimerFired() | ev.TimerCancelled():
                self._timer_ended(event)
            case ev.StepScheduled() | ev.MapScheduled():
                self._scheduled(event)
            case _:
                self._step_event(event)
        self._last_at = max(self._last_at, event.at)

    # The run ----------------------------------------------------------------------------------------------------

    def _activated(self, event: ev.RunActivated) -> None:
        about = {
            "pyworkflow.epoch": event.epoch,
            "pyworkflow.cause": event.cause,
            "pyworkflow.node": event.node or None,
        }
        waited, self._parked = self._parked, None
        if self._ended:  # a failed run goes on: its root was told, so it gets a span of its own below it
            self._ended, self._life = False, self._life + 1
            self._life_at, self._life_cause = event.at, event.cause
            self._marks = []
        elif waited is not None:
            name = "paused" if isinstance(waited, ev.RunPaused) else "parked"
            if isinstance(waited, ev.RunPaused):
                about["pyworkflow.pause_reason"] = waited.reason
            self._under_run(name, (name, event.epoch), waited.at, event.at, about)
        elif event.epoch == 0:
            self._under_run("queued", ("queued",), self._created.at, event.at, about)
        else:
            self._recoveries += 1
            about["pyworkflow.charged"] = event.charged
            self._under_run("recovery", ("recovery", event.epoch), self._last_at, event.at, about)
        self._epoch = event.epoch
        if event.cause != "start":
            self._mark("run_activated", event.at, {"cause": event.cause, "epoch": event.epoch, "node": event.node})
        for position in event.resets:
            self._begin_anew(position, event.at)

    def _run_ended(self, event: ev.RunCompleted | ev.RunFailed | ev.RunCancelled) -> None:
        if self._ended:
            return
        for position in list(self._steps):
            self._step_ended(position, event.at, "cancelled")
        for timer in list(self._timers.values()):
            self._timer_ended(ev.TimerCancelled(position=timer.position, at=event.at))
        error = getattr(event, "error", None)
        status = event.type.removeprefix("run_")
        attributes: dict[str, Any] = {
            "pyworkflow.version": self._created.version,
            "pyworkflow.status": status,
            "pyworkflow.retries": self._retries,
            "pyworkflow.recoveries": self._recoveries,
            "pyworkflow.epochs": self._epoch + 1,
            "pyworkflow.rerun_of": self._created.rerun_of,
            **plain_attributes(self._created.attributes, "pyworkflow.attributes."),
        }
        name = short_name(self._created.workflow)
        if self._life:
            attributes["pyworkflow.cause"] = self._life_cause
        self._tell(
            name if not self._life else f"{name} ({self._life_cause})",
            run_span_id(self._uid, self._life),
            run_span_id(self._uid) if self._life else self._parent,
            self._life_at,
            event.at,
            attributes,
            outcome=_outcome(status, error, status == "completed"),
            events=[*self._marks, *_exception(error, event.at)],
            remote_parent=not self._life and self._parent is not None,
        )
        self._ended, self._marks = True, []

    def _mark(self, name: str, at: float, attributes: dict[str, Any]) -> None:
        self._marks.append((name, ns(at), plain_attributes(attributes)))

    def _under_run(
        self, name: str, key: tuple[object, ...], start: float, end: float, attributes: dict[str, Any]
    ) -> None:
        own = run_span_id(self._uid, self._life)
        self._tell(name, span_id(self._uid, *key), own, start, end, attributes)

    def _timer_ended(self, event: ev.TimerFired | ev.TimerCancelled) -> None:
        timer = self._timers.pop(event.position, None)
        if timer is not None:
            about = {
                "pyworkflow.position": timer.position,
                "pyworkflow.delay_s": timer.delay_s,
                "pyworkflow.status": "fired" if isinstance(event, ev.TimerFired) else "cancelled",
            }
            life = self._live(f"timer {timer.position}")
            self._under_run("sleep", ("timer", timer.position, life), timer.at, event.at, about)

    def _live(self, what: str) -> int:
        """How often it has ended before; now once more."""
        life = self._lives.get(what, 0)
        self._lives[what] = life + 1
        return life

    # Steps ------------------------------------------------------------------------------------------------------

    def _scheduled(self, event: ev.StepScheduled | ev.MapScheduled) -> None:
        step = self._steps[event.position] = _Step(
            event, event.at, self._lives.get(event.position, 0), dispatched=(self._epoch, 1, event.at)
        )
        if isinstance(event, ev.MapScheduled):
            step.total = event.total
            if event.total == 0:
                self._step_ended(event.position, event.at, "completed")

    def _begin_anew(self, position: str, at: float) -> None:
        """A step that had failed is tried again with fresh attempts."""
        ended = self._ended_steps.pop(position, None)
        if ended is None:
            return
        self._steps[position] = _Step(
            ended.event,
            at,
            ended.life + 1,
            ended.told,
            ended.known,
            total=ended.total,
            done=ended.done - ended.items_failed,
        )

    def _step_event(self, event: ev.Event) -> None:
        position = str(getattr(event, "position", ""))
        chunk = parse_position(position)
        position = chunk[0] if chunk is not None else position
        if self._life and position not in self._steps:
            self._begin_anew(position, event.at)  # it had ended with the run that was resumed
        step = self._steps.get(position)
        if step is None:
            return  # an event of a newer version, or of a step whose end is told
        if isinstance(step.event, ev.MapScheduled) and not isinstance(event, ev.StepCancelled):
            return self._map_event(step, event)
        match event:
            case ev.StepStarted():
                fence = (self._epoch, event.dispatch, event.attempt)
                self._lose_before(step, fence, event.at)
                if event.attempt > step.told:
                    self._end_wait(step, event.started_at)
                    step.running[fence] = _Open(event.started_at, event.worker, event.node)
                    step.known = max(step.known, event.attempt)
            case ev.StepDispatched():
                step.dispatched = (self._epoch, event.dispatch, event.at)
            case ev.AttemptFailed():
                self._attempt_failed(step, event)
            case ev.AttemptsFailed():
                for one in event.each():
                    self._attempt_failed(step, one)
            case ev.AttemptsCounted():
                step.counted.append(event)
                step.known = max(step.known, event.last)
            case ev.StepHandedBack():
                step.dispatched = None
                if step.wait is None and event.dispatch:
                    about = {"pyworkflow.breaker": step.event.breaker, "pyworkflow.refused": True}
                    key = ("refused", position, self._epoch, event.dispatch)
                    step.wait = _Wait(key, "breaker wait" if step.event.breaker else "wait", event.at, about)
            case ev.StepLost():
                self._lost(step, event)
            case ev.StepCompleted():
                self._completed(step, event)
            case ev.StepFailed():
                self._failed(step, event)
            case ev.StepCancelled():
                self._step_ended(position, event.at, "cancelled")

    def _attempt_failed(self, step: _Step, event: ev.AttemptFailed) -> None:
        fence = (self._epoch, event.dispatch, event.attempt)
        if event.attempt <= step.told and fence not in step.running:
            return  # told already
        step.error = event.error
        step.tries += 1
        step.late += any(event.attempt <= counted.last for counted in step.counted)
        self._retries += event.delay_s is not None
        about = {
            "pyworkflow.delay_s": event.delay_s,
            "pyworkflow.delay_reason": event.delay_reason,
            "pyworkflow.error_kind": event.error.kind,
        }
        outcome = _outcome("failed", event.error, False)
        self._attempt(step, fence, event.started_at, event.ended_at, "failed", about, outcome, event, event.error)
        if event.delay_s is not None:
            about = {"pyworkflow.delay_s": event.delay_s, "pyworkflow.delay_reason": event.delay_reason}
            step.wait = _Wait(("wait", step.event.position, *fence), "retry wait", event.ended_at, about)

    def _completed(self, step: _Step, event: ev.StepCompleted) -> None:
        fence = (self._epoch, event.dispatch, event.attempt)
        completion = (event.dispatch, event.attempt, event.started_at)
        if self._completions.get(step.event.position) != completion:  # else it is known from before a resume
            step.tries += 1
            outcome: tuple[SpanStatus, str] = ("ok", "")
            self._attempt(step, fence, event.started_at, event.ended_at, "succeeded", {}, outcome, event, None)
            self._completions[step.event.position] = completion
        step.error = None
        self._step_ended(step.event.position, event.ended_at, "completed")

    def _failed(self, step: _Step, event: ev.StepFailed) -> None:
        fence = (self._epoch, event.dispatch, event.attempt)
        running = step.running.get(fence)
        if running is not None:  # its end is told by the step's
            step.tries += 1
            outcome = _outcome("failed", event.error, False)
            self._attempt(step, fence, running.started_at, event.at, "failed", {}, outcome, running, event.error)
        step.error = event.error
        refused = [("breaker_refused", ns(event.at), plain_attributes({"breaker": step.event.breaker}))]
        self._step_ended(step.event.position, event.at, "failed", event.why, refused if event.why == "refused" else [])

    def _lost(self, step: _Step, event: ev.StepLost) -> None:
        if step.dispatched is not None:
            epoch, dispatch, at = step.dispatched
            if all(fence[:2] != (epoch, dispatch) for fence in step.running):  # whether one had begun is unknown
                step.running[(epoch, dispatch, step.known + 1)] = _Open(max(at, step.wait.since if step.wait else at))
        step.dispatched = None
        for fence in sorted(step.running):
            self._lose(step, fence, event.at, event.cause, event.charged)

    def _lose_before(self, step: _Step, fence: Fence, at: float) -> None:
        """A later execution has begun, so one whose end nobody recorded went down with its owner."""
        for old in [f for f in step.running if f[:2] < fence[:2]]:
            self._lose(step, old, at, "run_actor_lost", False)

    def _lose(self, step: _Step, fence: Fence, at: float, cause: str, charged: bool) -> None:
        step.lost += 1
        self._recoveries += cause != "run_actor_lost"
        open_ = step.running[fence]
        about = {"pyworkflow.lost_cause": cause, "pyworkflow.charged": charged}
        outcome: tuple[SpanStatus, str] = ("error", cause.replace("_", " "))
        told, known = step.told, step.known
        self._attempt(step, fence, open_.started_at, at, "lost", about, outcome, open_, None)
        step.told, step.known = told, known  # where nobody knew that it had begun, its number is used again

    def _attempt(
        self,
        step: _Step,
        fence: Fence,
        start: float,
        end: float,
        status: str,
        about: dict[str, Any],
        outcome: tuple[SpanStatus, str],
        where: Any,
        error: ev.ErrorInfo | None,
    ) -> None:
        self._end_wait(step, start)
        running = step.running.pop(fence, None)
        self._lose_before(step, fence, start)
        step.told, step.known = max(step.told, fence[2]), max(step.known, fence[2])
        epoch, dispatch, attempt = fence
        position = step.event.position
        self._tell(
            f"{self._name(step)} attempt {attempt}",
            attempt_span_id(self._uid, position, epoch, dispatch, attempt),
            step_span_id(self._uid, position, step.life),
            start,
            end,
            {
                "pyworkflow.step": step.event.step,
                "pyworkflow.position": position,
                "pyworkflow.attempt": attempt,
                "pyworkflow.epoch": epoch,
                "pyworkflow.dispatch": dispatch,
                "pyworkflow.status": status,
                "pyworkflow.breaker_state": getattr(where, "breaker", None),
                "pyworkflow.worker": where.worker or (running.worker if running is not None else "") or None,
                "pyworkflow.node": where.node or (running.node if running is not None else "") or None,
                **about,
            },
            outcome=outcome,
            events=_exception(error, end),
        )

    def _end_wait(self, step: _Step, at: float) -> None:
        wait, step.wait = step.wait, None
        if wait is not None:
            position = step.event.position
            about = {"pyworkflow.position": position, **wait.attributes}
            own = step_span_id(self._uid, position, step.life)
            self._tell(wait.name, span_id(self._uid, *wait.key), own, wait.since, at, about)

    def _step_ended(
        self, position: str, at: float, status: str, why: str | None = None, events: Iterable[SpanEvent] = ()
    ) -> None:
        step = self._steps.pop(position, None)
        if step is None:
            return
        self._lives[position] = step.life + 1
        for fence in sorted(step.running):
            open_ = step.running[fence]
            ended = "cancelled" if status == "cancelled" else "lost"
            outcome: tuple[SpanStatus, str] = ("unset", "") if ended == "cancelled" else ("error", "lost")
            self._attempt(step, fence, open_.started_at, at, ended, {}, outcome, open_, None)
        self._end_wait(step, at)
        self._tell_counted(step)
        error = step.error if status == "failed" else None
        failed: tuple[SpanStatus, str] = ("error", (why or "failed").replace("_", " "))
        self._tell(
            self._name(step),
            step_span_id(self._uid, position, step.life),
            run_span_id(self._uid, self._life),
            step.began_at,
            at,
            {
                "pyworkflow.step": step.event.step,
                "pyworkflow.position": position,
                "pyworkflow.tries": step.tries,
                "pyworkflow.lost": step.lost,
                "pyworkflow.status": status,
                "pyworkflow.why": why,
                "pyworkflow.breaker": step.event.breaker,
                "pyworkflow.executor": step.event.executor,
                "pyworkflow.items": step.done if isinstance(step.event, ev.MapScheduled) else None,
            },
            outcome=_outcome(status, error, status == "completed") if error or status != "failed" else failed,
            events=[*events, *_exception(error, at)],
        )
        if status != "completed" or step.items_failed:
            self._ended_steps[position] = step

    def _tell_counted(self, step: _Step) -> None:
        """Of a step that was retried very often the attempts between the first and the last are one span a count."""
        step.tries -= step.late
        self._retries -= step.late
        for event in step.counted:
            fence = (event.dispatch, event.first)
            step.tries += event.last - event.first + 1
            self._retries += event.last - event.first + 1
            about = {
                "pyworkflow.position": event.position,
                "pyworkflow.attempts_counted": event.last - event.first + 1,
                **{f"pyworkflow.errors.{name}": number for name, number in event.counts.items()},
            }
            own = step_span_id(self._uid, step.event.position, step.life)
            self._tell(
                f"{self._name(step)}, counted attempts",
                span_id(self._uid, "counted", event.position, *fence),
                own,
                event.started_at,
                event.ended_at,
                about,
                outcome=("error", f"{event.last - event.first + 1} attempts failed"),
            )

    # Maps -------------------------------------------------------------------------------------------------------

    def _map_event(self, step: _Step, event: ev.Event) -> None:
        own = step_span_id(self._uid, step.event.position, step.life)
        if isinstance(event, ev.ChunkCompleted):
            self._retries += sum(event.retried.values())
            step.done += event.done - len(event.waiting)
            name = chunk_position(event.position, event.first, event.count)
            failed = len(event.failures)
            step.items_failed += failed
            self._tell(
                f"{self._name(step)} chunk",
                span_id(self._uid, "chunk", name, self._epoch, event.dispatch, event.seq),
                own,
                event.started_at,
                event.ended_at,
                {
                    "pyworkflow.position": name,
                    "pyworkflow.items": event.done,
                    "pyworkflow.items_failed": failed,
                    "pyworkflow.items_waiting": len(event.waiting),
                    "pyworkflow.worker": event.worker or None,
                    "pyworkflow.node": event.node or None,
                },
                outcome=("error", f"{failed} of {event.done} items failed") if failed else ("ok", ""),
                events=[e for error in event.errors[:3] for e in _exception(error, event.ended_at)],
            )
            if event.last:
                step.total = event.first + event.count
            if step.total is not None and step.done >= step.total:
                self._step_ended(step.event.position, event.at, "completed")
        elif isinstance(event, ev.StepLost):
            step.lost += 1
            about = {"pyworkflow.position": event.position, "pyworkflow.lost_cause": event.cause}
            key = ("lost", event.position, self._epoch, event.dispatch, event.seq)
            name = f"{self._name(step)} chunk lost"
            cause = event.cause.replace("_", " ")
            self._tell(name, span_id(self._uid, *key), own, event.at, event.at, about, outcome=("error", cause))
        elif isinstance(event, ev.StepFailed):
            step.error = event.error
            self._step_ended(step.event.position, event.at, "failed", event.why)

    def _name(self, step: _Step) -> str:
        undoes = isinstance(step.event, ev.StepScheduled) and step.event.compensates
        return short_name(step.event.step) + (" (compensation)" if undoes else "")

    def _tell(
        self,
        name: str,
        own_id: str,
        parent: str | None,
        start: float,
        end: float,
        attributes: dict[str, Any],
        *,
        outcome: tuple[SpanStatus, str] = ("unset", ""),
        events: list[SpanEvent] | None = None,
        remote_parent: bool = False,
    ) -> None:
        self._finished.append(
            SpanData(
                name,
                self._trace,
                own_id,
                parent,
                ns(start),
                ns(max(start, end)),
                plain_attributes({**self._common, **attributes}),
                *outcome,
                events or [],
                remote_parent=remote_parent,
            )
        )


def parent_of(created: ev.RunCreated) -> str | None:
    """Span id of what was current where the run was started."""
    return created.traceparent.split("-")[2] if created.traceparent else None


def trace_spans(events: Iterable[ev.Event]) -> list[SpanData]:
    """All finished spans of a run, in the order in which they were finished."""
    fold: TraceFold | None = None
    for event in events:
        if fold is None:
            assert isinstance(event, ev.RunCreated), "a run's events begin with run_created"
            fold = TraceFold(event)
        else:
            fold.apply(event)
    return fold.take() if fold is not None else []


def _outcome(status: str, error: ev.ErrorInfo | None, fine: bool) -> tuple[SpanStatus, str]:
    if fine:
        return "ok", ""
    if error is not None:
        return "error", f"{error.type}: {error.message}"
    return ("error", status) if status == "failed" else ("unset", "")


def _exception(error: ev.ErrorInfo | None, at: float) -> list[SpanEvent]:
    """The exception as OpenTelemetry's semantic conventions name its parts."""
    if error is None:
        return []
    attributes = {
        "exception.type": f"{error.module}.{error.type}" if error.module else error.type,
        "exception.message": error.message,
        "exception.stacktrace": error.traceback,
    }
    return [("exception", ns(at), attributes)]
