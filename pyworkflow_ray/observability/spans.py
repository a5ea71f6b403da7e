"""Events to OpenTelemetry spans: the log is the truth, the trace its projection.

Pure but for `export_run`, which hands the spans to an exporter: nothing is kept between calls, so a killed process
loses no span and a resumed run continues its trace. Ids are derived from the run's uid, position and the fence (epoch,
dispatch, attempt) of an attempt; code that runs inside a step uses the same functions for its parent.
The only module with opentelemetry. Called by handles and the runtime; calls story.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.ids import span_id, trace_id
from pyworkflow_ray.observability.steps import Attempt, Track
from pyworkflow_ray.observability.story import Story
from pyworkflow_ray.observability.view import tell

SCOPE = InstrumentationScope("pyworkflow_ray")
_OK, _UNSET = Status(StatusCode.OK), Status(StatusCode.UNSET)


def run_span_id(run_uid: str) -> str:
    """16 hexadecimal digits: the root span of a run."""
    return span_id(run_uid, "run")


def step_span_id(run_uid: str, position: str) -> str:
    """The span of a step: from its scheduling to its end, all attempts and waits within."""
    return span_id(run_uid, "step", position)


def attempt_span_id(run_uid: str, position: str, epoch: int, dispatch: int, attempt: int) -> str:
    """The span of one attempt: the current span of the code inside the step."""
    return span_id(run_uid, "attempt", position, epoch, dispatch, attempt)


def run_spans(events: Sequence[ev.Event], *, resource: Resource | None = None) -> list[ReadableSpan]:
    """The finished spans of a run: attempts and steps that have ended and, once the run has, its root.

    A span is finished or absent, so that exporting a run's spans as it goes on repeats none with other contents; what a
    lost worker began is a span that ends with an error when the loss was recorded.

    Args:
        events: The run's accepted events in order.
        resource: Describes the process that exports (default: the SDK's own).
    """
    story = tell(events, events[-1].at if events else 0.0)
    make = _Maker(story, resource if resource is not None else Resource.create({"service.name": "pyworkflow-ray"}))
    spans = []
    for track in story.steps.values():
        spans += [make.attempt(track, a) for a in track.attempts if a.ended_at is not None]
        if track.ended_at is not None:
            spans.append(make.step(track))
    if story.ended_at is not None:
        spans.append(make.run(events))
    return spans


def export_run(
    events: Sequence[ev.Event],
    exporter: SpanExporter,
    *,
    already: Iterable[str] = (),
    resource: Resource | None = None,
) -> list[str]:
    """Export the finished spans of a run; returns their ids.

    Args:
        events: The run's accepted events in order.
        exporter: Any `SpanExporter`.
        already: Span ids to leave out: what an earlier call returned.
        resource: As for `run_spans`.

    Raises:
        RuntimeError: the exporter reported a failure; call again with the same `already`.
    """
    known = set(already)
    spans = [s for s in run_spans(events, resource=resource) if _hex_id(s) not in known]
    if spans and exporter.export(spans) is not SpanExportResult.SUCCESS:
        raise RuntimeError(f"{type(exporter).__name__} did not take {len(spans)} spans")
    return [_hex_id(span) for span in spans]


def _hex_id(span: ReadableSpan) -> str:
    context = span.context
    return "" if context is None else f"{context.span_id:016x}"


def _ns(at: float) -> int:
    return round(at * 1e6) * 1000  # microseconds are all that a float of seconds since 1970 holds


class _Maker:
    def __init__(self, story: Story, resource: Resource) -> None:
        created = story.created
        self.story, self.uid, self.resource = story, created.run_uid, resource
        self.trace = int(created.trace_id or trace_id(created.run_uid), 16)
        self.common: dict[str, Any] = {
            "pyworkflow.run_id": created.run_id,
            "pyworkflow.workflow": created.workflow,
        }

    def _context(self, hex_id: str) -> SpanContext:
        return SpanContext(self.trace, int(hex_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    def _span(
        self,
        name: str,
        hex_id: str,
        parent: str | None,
        start: float,
        end: float,
        attributes: dict[str, Any],
        *,
        status: Status = _UNSET,
        events: Sequence[SpanEvent] = (),
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> ReadableSpan:
        return ReadableSpan(
            name=name,
            context=self._context(hex_id),
            parent=None if parent is None else self._context(parent),
            resource=self.resource,
            attributes={k: v for k, v in {**self.common, **attributes}.items() if v is not None},
            events=events,
            kind=kind,
            status=status,
            start_time=_ns(start),
            end_time=_ns(max(start, end)),
            instrumentation_scope=SCOPE,
        )

    def attempt(self, track: Track, attempt: Attempt) -> ReadableSpan:
        end = attempt.ended_at if attempt.ended_at is not None else track.scheduled.at
        start = attempt.started_at if attempt.started_at is not None else end
        position = track.scheduled.position
        status = {"succeeded": _OK, "cancelled": _UNSET}.get(attempt.status, _failure(attempt.error, attempt.cause))
        return self._span(
            f"{track.name} attempt {attempt.attempt}" if not attempt.counts else f"{track.name}, counted attempts",
            attempt_span_id(self.uid, position, attempt.epoch, attempt.dispatch, attempt.attempt),
            step_span_id(self.uid, position),
            start,
            end,
            {
                "pyworkflow.position": position,
                "pyworkflow.attempt": attempt.attempt,
                "pyworkflow.attempts_counted": attempt.number if attempt.counts else None,
                "pyworkflow.epoch": attempt.epoch,
                "pyworkflow.dispatch": attempt.dispatch,
                "pyworkflow.status": attempt.status,
                "pyworkflow.lost_cause": attempt.cause,
                "pyworkflow.delay_s": attempt.delay_s,
                "pyworkflow.delay_reason": attempt.delay_reason,
                "pyworkflow.breaker_state": attempt.breaker,
                "pyworkflow.worker": attempt.worker or None,
                "pyworkflow.node": attempt.node or None,
            },
            status=status,
            events=_exception(attempt.error, end),
        )

    def step(self, track: Track) -> ReadableSpan:
        end = track.ended_at if track.ended_at is not None else track.scheduled.at
        return self._span(
            track.name,
            step_span_id(self.uid, track.scheduled.position),
            run_span_id(self.uid),
            track.scheduled.at,
            end,
            {
                "pyworkflow.step": track.scheduled.step,
                "pyworkflow.position": track.scheduled.position,
                "pyworkflow.tries": track.tries,
                "pyworkflow.lost": track.lost_count,
                "pyworkflow.status": track.state,
                "pyworkflow.why": track.why,
                "pyworkflow.breaker": track.scheduled.breaker,
            },
            status=_OK if track.state == "completed" else _failure(track.error, track.why) if track.error else _UNSET,
            events=_exception(track.error, end),
        )

    def run(self, events: Sequence[ev.Event]) -> ReadableSpan:
        story = self.story
        end = story.ended_at if story.ended_at is not None else story.last_at
        error = story.failed.error if story.failed else None
        return self._span(
            self.common["pyworkflow.workflow"],
            run_span_id(self.uid),
            None,
            story.created.at,
            end,
            {
                "pyworkflow.version": story.created.version,
                "pyworkflow.status": story.status,
                "pyworkflow.retries": story.retries,
                "pyworkflow.recoveries": story.recoveries,
                "pyworkflow.epochs": story.epoch + 1,
            },
            status=_OK if story.completed else _failure(error, story.status) if error else _UNSET,
            events=[*_activations(events), *_exception(error, end)],
        )


def _activations(events: Sequence[ev.Event]) -> list[SpanEvent]:
    """Each time an actor took the run up after the first: a crash and a resume are seen on the root span."""
    return [
        SpanEvent("run_activated", {"cause": e.cause, "epoch": e.epoch, "node": e.node}, _ns(e.at))
        for e in events
        if isinstance(e, ev.RunActivated) and e.cause != "start"
    ]


def _failure(error: ev.ErrorInfo | None, fallback: str | None) -> Status:
    return Status(StatusCode.ERROR, f"{error.type}: {error.message}" if error else (fallback or "").replace("_", " "))


def _exception(error: ev.ErrorInfo | None, at: float) -> list[SpanEvent]:
    """The exception as OpenTelemetry's semantic conventions name its parts."""
    if error is None:
        return []
    attributes = {
        "exception.type": f"{error.module}.{error.type}" if error.module else error.type,
        "exception.message": error.message,
        "exception.stacktrace": error.traceback,
    }
    return [SpanEvent("exception", attributes, _ns(at))]
