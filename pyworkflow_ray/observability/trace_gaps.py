"""Attempts that users' spans hang from and that no event tells: a span each, so that there are no orphans.

Pure. Called by the observer process once a run has ended; calls `trace`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.spandata import SpanData, run_span_id, step_span_id
from pyworkflow_ray.observability.trace import trace_spans


def untold_attempts(events: Iterable[ev.Event], places: dict[str, list[Any]]) -> list[SpanData]:
    """Spans for attempts that users' spans hang from and that the log of an ended run does not tell.

    Such are attempts of a step that was cancelled, or whose worker was lost, before it told them, and of a step with
    relaxed durability that its owner took with it.

    Args:
        places: By span id: position, epoch, dispatch, attempt.
    """
    events = list(events)
    told = {span.span_id: span for span in trace_spans(events)}
    made = []
    for own, (position, epoch, dispatch, attempt) in places.items():
        created = events[0]
        assert isinstance(created, ev.RunCreated)
        step = told.get(step_span_id(created.run_uid, position)) or told.get(run_span_id(created.run_uid))
        if own in told or step is None:
            continue
        about = {
            "pyworkflow.run_id": created.run_id,
            "pyworkflow.workflow": created.workflow,
            "pyworkflow.position": position,
            "pyworkflow.attempt": attempt,
            "pyworkflow.epoch": epoch,
            "pyworkflow.dispatch": dispatch,
            "pyworkflow.status": "unknown",
        }
        name = f"{step.name} attempt {attempt}"
        made.append(SpanData(name, step.trace_id, own, step.span_id, step.start, step.end, about))
    return made
