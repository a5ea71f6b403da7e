"""A run's trace as a fold of its events: monotone, whole, without orphans, whatever crashes. By simulated histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.spandata import SpanData, attempt_span_id, run_span_id, step_span_id
from pyworkflow_ray.observability.trace import TraceFold, trace_spans
from pyworkflow_ray.testing.simulate import simulate
from pyworkflow_ray.testing.simulator import Simulator

Make = Callable[..., Any]
SEEDS = range(60)
UID = "uorder-42"


def folded(events: list[ev.Event]) -> list[list[SpanData]]:
    """Spans that each event finishes."""
    assert isinstance(events[0], ev.RunCreated)
    fold, told = TraceFold(events[0]), []
    for event in events[1:]:
        fold.apply(event)
        told.append(fold.take())
    return told


def executions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Attempts that workers really began: (position, epoch, dispatch, attempt)."""
    begun: list[tuple[str, int, int, int]] = []
    original = Simulator._note

    def note(self: Simulator, driver: Any, note: Any) -> None:
        if isinstance(note, ev.StepStarted):
            begun.append((note.position, self._epoch, note.dispatch, note.attempt))
        original(self, driver, note)

    monkeypatch.setattr(Simulator, "_note", note)
    return begun


def scheduled_in(events: list[ev.Event], position: str) -> int:
    """Last epoch in which the step was recorded anew."""
    epoch, found = 0, 1 << 30
    for event in events:
        if isinstance(event, ev.RunActivated):
            epoch = event.epoch
        elif isinstance(event, ev.StepScheduled) and event.position == position:
            found = epoch
    return found


def test_of_crashed_runs_no_span_is_told_twice_and_none_is_an_orphan(monkeypatch: Any) -> None:
    begun = executions(monkeypatch)
    crashes = lost = 0
    for seed in SEEDS:
        begun.clear()
        simulation, _ = simulate(seed)
        events = simulation.events
        if simulation.ended is None or not isinstance(events[-1], ev.TERMINAL):
            continue
        spans = [span for some in folded(events) for span in some]
        ids = [span.span_id for span in spans]
        assert len(ids) == len(set(ids)), f"seed {seed}: a span is told twice"
        orphans = [s.name for s in spans if s.parent_id is not None and s.parent_id not in set(ids)]
        assert orphans == [], f"seed {seed}: {orphans}"
        roots = [span for span in spans if span.parent_id is None]
        assert [span.span_id for span in roots] == [run_span_id("0" * 32)], f"seed {seed}"
        assert all(span.start <= span.end for span in spans)
        missing = {key for key in begun if attempt_span_id("0" * 32, *key) not in set(ids)}
        # Never told are only: attempts that follow each other fast, which a worker tells together, and an attempt of a
        # step that was cancelled before its start was told, or whose owner died with it before it was durable (relaxed
        # durability). Spans within them are handled by `untold_attempts`.
        stopped = {
            s.attributes.get("pyworkflow.position")
            for s in spans
            if s.attributes.get("pyworkflow.status") == "cancelled"
        }
        missing -= {key for key in missing if (*key[:3], key[3] - 1) in begun or key[0] in stopped}
        missing -= {key for key in missing if key[1] < scheduled_in(events, key[0])}
        assert missing == set(), f"seed {seed}: attempts that ran without a span: {missing}"
        crashes += simulation.struck["crash"]
        lost += sum(span.attributes.get("pyworkflow.status") == "lost" for span in spans)
    assert crashes > 40
    assert lost > 30


def by_name(spans: list[SpanData]) -> dict[str, SpanData]:
    return {span.name: span for span in spans}


def test_parent_is_the_callers_span_and_the_trace_is_its_trace(history: Make) -> None:
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    run = history(traceparent=parent, trace_id="a" * 32).activated(0)
    run.add(1, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    root = by_name(trace_spans(run.events))["checkout"]
    assert (root.trace_id, root.parent_id, root.remote_parent) == ("a" * 32, "b" * 16, True)


def test_waits_parking_and_a_pause_are_spans(history: Make) -> None:
    run = history().activated(1).scheduled(1, "charge", max_retries=3).failed_attempt(2, "1", 1, 3600)
    run.add(2, ev.StepHandedBack(position="1", dispatch=1, due_at=0)).add(2, ev.RunParked(due_at=0))
    run.activated(3602, 1, "wake").add(3602, ev.StepDispatched(position="1", dispatch=1))
    run.completed_step(3603, "1", 2, took=0.5).add(3603, ev.RunPaused(reason="user", message=""))
    run.activated(4000, 2, "resume").add(4001, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    spans = by_name(trace_spans(run.events))
    took = {name: (span.end - span.start) / 1e9 for name, span in spans.items()}
    assert took == {
        "queued": 1.0, "charge attempt 1": 1.0, "parked": 3600.0, "retry wait": 3600.5, "charge attempt 2": 0.5,
        "charge": 3602.0, "paused": 397.0, "checkout": 4001.0,
    }  # fmt: skip
    assert spans["retry wait"].attributes["pyworkflow.delay_s"] == 3600
    assert spans["retry wait"].parent_id == step_span_id(UID, "1")
    assert [name for name, _, _ in spans["checkout"].events] == ["run_activated", "run_activated"]


def test_breaker_refusals_are_seen(history: Make, make_error: Make) -> None:
    error = make_error("CircuitOpenError", "open", "cascade")
    run = history().activated(0).scheduled(0, "charge", breaker="pay")
    run.add(1, ev.StepFailed(position="1", dispatch=1, attempt=0, error=error, why="refused"))
    run.scheduled(1, "notify", breaker="mail").add(2, ev.StepHandedBack(position="2", dispatch=1, due_at=0))
    run.add(30, ev.StepDispatched(position="2", dispatch=2)).completed_step(31, "2", took=1, dispatch=2)
    run.add(31, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    spans = by_name(trace_spans(run.events))
    assert [name for name, _, _ in spans["charge"].events] == ["breaker_refused", "exception"]
    assert (spans["charge"].status, spans["charge"].attributes["pyworkflow.why"]) == ("error", "refused")
    wait = spans["breaker wait"]
    assert (wait.attributes["pyworkflow.breaker"], (wait.end - wait.start) / 1e9) == ("mail", 28.0)


def test_failed_run_that_is_resumed_gets_a_span_below_its_first(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").failed_attempt(1, "1", 1, None)
    run.add(1, ev.StepFailed(position="1", dispatch=1, attempt=1, error=make_error()))
    run.add(1, ev.RunFailed(error=make_error(), position="1"))
    first = trace_spans(run.events)
    run.activated(60, 1, "resume", resets=["1"]).add(60, ev.StepDispatched(position="1", dispatch=1))
    run.completed_step(61, "1", 2).add(61, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    whole = trace_spans(run.events)
    assert whole[: len(first)] == first
    later = by_name(whole[len(first) :])
    assert later["checkout (resume)"].parent_id == run_span_id(UID)
    assert later["charge"].parent_id == later["checkout (resume)"].span_id
    assert later["charge attempt 2"].parent_id == later["charge"].span_id


def test_span_read_again_from_its_text_is_the_same(history: Make) -> None:
    for span in trace_spans(history().activated(0).scheduled(0, "a").failed_attempt(1, "1", 1, 0.5).events):
        assert SpanData.from_json(span.to_json()) == span


def test_counted_attempts_are_one_span_and_no_retry_is_counted_twice(history: Make) -> None:
    run = history().activated(0).scheduled(0, "poll", max_retries=None).failed_attempt(1, "1", 1, 0.1)
    counted = ev.AttemptsCounted(
        position="1", dispatch=1, first=2, last=9, started_at=0, ended_at=0, counts={"ConnectionError": 8}
    )
    run.add(5, counted).failed_attempt(6, "1", 9, 0.1).completed_step(7, "1", 10)
    run.add(7, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    spans = by_name(trace_spans(run.events))
    assert spans["poll, counted attempts"].attributes["pyworkflow.attempts_counted"] == 8
    assert spans["poll"].attributes["pyworkflow.tries"] == 10
    assert spans["checkout"].attributes["pyworkflow.retries"] == 9
