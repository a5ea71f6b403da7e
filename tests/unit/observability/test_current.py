"""The current span: callers', attempts', and users' spans that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from pyworkflow_ray.execution.context import KeyScope, StepContext, entered, trace_attempts
from pyworkflow_ray.observability import current
from pyworkflow_ray.observability.spandata import SpanData, attempt_span_id, step_span_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def step(position: str = "3", inline: int = 0, **fields: str) -> StepContext:
    scope = KeyScope("s", "uid", 0, position, None, inline)
    return StepContext(
        "charge", 2, "key", (1, 4, 2), run_id="order-1", trace_id=TRACE, position=position, _scope=scope, **fields
    )


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyworkflow_ray.execution.context as context

    monkeypatch.setattr(context, "_tracing", None)
    trace_attempts(current.entering, current.leaving)


@pytest.fixture
def spool(tmp_path: Path) -> tuple[trace.Tracer, Path]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(current.processor(current.Spool(str(tmp_path))))
    return provider.get_tracer("shop"), tmp_path / current.SPOOL


def groups(directory: Path) -> list[dict]:
    return [group for path in sorted(directory.glob("*")) for group in current.read_spool(str(path), 0)[0]]


def test_caller_is_the_span_that_is_current() -> None:
    assert current.caller() == ""
    with TracerProvider().get_tracer("a").start_as_current_span("request") as span:
        context = span.get_span_context()
        version, trace_id, span_id, flags = current.caller().split("-")
        assert (version, trace_id, span_id) == ("00", f"{context.trace_id:032x}", f"{context.span_id:016x}")
        assert int(flags, 16) & 1


def test_current_span_of_a_step_is_its_attempts() -> None:
    with entered(step()):
        context = trace.get_current_span().get_span_context()
        assert f"{context.trace_id:032x}" == TRACE
        assert f"{context.span_id:016x}" == attempt_span_id("uid", "3", 1, 4, 2)
        with entered(step(inline=1)):
            assert trace.get_current_span().get_span_context() == context
        assert trace.get_current_span().get_span_context() == context
    assert not trace.get_current_span().get_span_context().is_valid


def test_current_span_of_an_item_is_its_maps() -> None:
    with entered(step("3[0:10]")):
        assert f"{trace.get_current_span().get_span_context().span_id:016x}" == step_span_id("uid", "3")


def test_spans_of_a_step_are_written_when_the_uppermost_ends(spool: tuple[trace.Tracer, Path]) -> None:
    tracer, directory = spool
    with entered(step()), tracer.start_as_current_span("outer"):
        with tracer.start_as_current_span("inner", attributes={"n": [1, 2]}) as inner:
            inner.add_event("seen", {"x": 1.5})
        assert not directory.exists()
    (group,) = groups(directory)
    spans = [SpanData.from_json(json.dumps(span)) for span in group["spans"]]
    assert [span.name for span in spans] == ["inner", "outer"]
    assert group["place"] == ["order-1", "3", 1, 4, 2]
    assert spans[0].parent_id == spans[1].span_id
    assert spans[1].parent_id == attempt_span_id("uid", "3", 1, 4, 2)
    assert (spans[1].remote_parent, spans[1].attributes["pyworkflow.run_id"]) == (True, "order-1")
    assert spans[0].events[0][0] == "seen"


def test_spans_of_an_unsampled_run_are_not_recorded(spool: tuple[trace.Tracer, Path]) -> None:
    tracer, directory = spool
    with entered(step(traceparent=f"00-{TRACE}-00f067aa0ba902b7-00")), tracer.start_as_current_span("outer"):
        pass
    assert not directory.exists()


def test_torn_and_damaged_lines_of_a_spool_hide_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.spool"
    whole, other = current.spool_line({"n": 1}), current.spool_line({"n": 2})
    path.write_bytes(whole + b"0" + other[1:] + whole + other[:5])
    found, behind, ended = current.read_spool(str(path), 0)
    assert (found, behind, ended) == ([{"n": 1}, {"n": 1}], len(whole) * 3, True)
