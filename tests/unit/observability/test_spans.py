"""Events to spans: one trace a run, across a kill, the same ids in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.spans import attempt_span_id, export_run, run_span_id, run_spans, step_span_id

Make = Callable[..., Any]
UID = "uorder-42"


@pytest.fixture
def killed(history: Make) -> Any:
    """A run whose owner was killed in its second step, and that another finished."""
    run = history().activated(0).scheduled(0, "validate").completed_step(1, "1", took=1)
    run.scheduled(1, "charge", max_retries=2).failed_attempt(2, "2", 1, 0.5).started(2.5, "2", 2)
    run.activated(9, 1, "recovery").started(10, "2", 2).completed_step(11, "2", 2, took=1)
    return run.add(11, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))


def by_id(spans: Any) -> dict[str, Any]:
    return {f"{span.context.span_id:016x}": span for span in spans}


def test_trace_spans_run_steps_and_attempts_across_a_kill(killed: Any) -> None:
    spans = by_id(run_spans(killed.events))
    assert sorted(span.name for span in spans.values()) == [
        "charge",
        "charge attempt 1",
        "charge attempt 2",
        "charge attempt 2",
        "checkout",
        "queued",
        "recovery",
        "retry wait",
        "validate",
        "validate attempt 1",
    ]
    assert {span.context.trace_id for span in spans.values()} == {1}
    root = spans[run_span_id(UID)]
    charge = spans[step_span_id(UID, "2")]
    assert root.parent is None
    assert f"{charge.parent.span_id:016x}" == run_span_id(UID)
    lost = spans[attempt_span_id(UID, "2", 0, 1, 2)]
    done = spans[attempt_span_id(UID, "2", 1, 1, 2)]
    assert f"{lost.parent.span_id:016x}" == f"{done.parent.span_id:016x}" == step_span_id(UID, "2")
    assert (lost.status.status_code, done.status.status_code) == (StatusCode.ERROR, StatusCode.OK)
    assert lost.attributes["pyworkflow.status"] == "lost"
    assert [e.attributes["cause"] for e in root.events] == ["recovery"]


def test_times_are_the_recorded_ones(killed: Any) -> None:
    spans = by_id(run_spans(killed.events))
    root, attempt = spans[run_span_id(UID)], spans[attempt_span_id(UID, "2", 0, 1, 1)]
    assert (root.start_time, root.end_time) == (1_800_000_000 * 10**9, 1_800_000_011 * 10**9)
    assert (attempt.start_time, attempt.end_time) == (1_800_000_001 * 10**9, 1_800_000_002 * 10**9)
    for span in spans.values():
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time


def test_failure_carries_exception_and_chosen_delay(killed: Any) -> None:
    failed = by_id(run_spans(killed.events))[attempt_span_id(UID, "2", 0, 1, 1)]
    assert failed.status.description == "ConnectionError: 503 from payments"
    assert failed.attributes["pyworkflow.delay_s"] == 0.5
    assert failed.events[0].attributes["exception.type"] == "shop.ConnectionError"
    assert "Traceback" in failed.events[0].attributes["exception.stacktrace"]


def test_what_a_prefix_exported_is_what_the_whole_log_exports(killed: Any) -> None:
    """A process that exported and was killed, and its successor, tell one trace: no span changes, none is lost."""
    whole = {key: span.to_json() for key, span in by_id(run_spans(killed.events)).items()}
    for cut in range(1, len(killed.events) + 1):
        for key, span in by_id(run_spans(killed.events[:cut])).items():
            assert span.to_json() == whole[key], f"span {span.name} differs after event {cut}"


def test_export_leaves_out_what_was_exported_before(killed: Any) -> None:
    exporter = InMemorySpanExporter()
    first = export_run(killed.events[:6], exporter)
    second = export_run(killed.events, exporter, already=first)
    assert not set(first) & set(second)
    assert set(by_id(exporter.get_finished_spans())) == set(first) | set(second)
    assert len(exporter.get_finished_spans()) == 10


def test_refusing_exporter_is_an_error(killed: Any) -> None:
    class Refusing(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.FAILURE

    with pytest.raises(RuntimeError, match="Refusing did not take 10 spans"):
        export_run(killed.events, Refusing())


def test_failed_run_and_its_step_are_errors(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").failed_attempt(1, "1", 1, None)
    run.add(1, ev.StepFailed(position="1", dispatch=1, attempt=1, error=make_error()))
    run.add(1, ev.RunFailed(error=make_error(), position="1"))
    assert {s.status.status_code for s in run_spans(run.events) if s.name != "queued"} == {StatusCode.ERROR}
