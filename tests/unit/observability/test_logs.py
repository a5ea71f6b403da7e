"""Log lines: where they are from, at which level, in which form, and each once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.context import get_logger
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.execution.context import KeyScope, StepContext, entered
from pyworkflow_ray.execution.log_records import FIELDS, enrich
from pyworkflow_ray.observability.log_format import JsonFormatter, TextFormatter, is_our_line
from pyworkflow_ray.observability.narrate import Narrator
from pyworkflow_ray.observability.spandata import attempt_span_id

Make = Callable[..., Any]


def step() -> StepContext:
    return StepContext(
        "charge", 2, "key", (1, 4, 2), run_id="order-42", workflow="shop:checkout", trace_id="a" * 32, position="3",
        attributes={"customer": "acme"}, _scope=KeyScope("s", "uid", 0, "3"),
    )  # fmt: skip


def record(name: str = "shop", **extra: Any) -> logging.LogRecord:
    made = logging.getLogger(name).makeRecord(
        name, logging.WARNING, "pay.py", 1, "slow: %s", ("pay",), None, extra=extra
    )
    enrich(made)
    return made


def test_record_of_any_logger_carries_its_place() -> None:
    with entered(step()):
        made = record()
    assert {name: getattr(made, name) for name in FIELDS} == {
        "run": "order-42",
        "workflow": "shop:checkout",
        "step": "charge",
        "attempt": 2,
        "trace_id": "a" * 32,
        "span_id": attempt_span_id("uid", "3", 1, 4, 2),
        "attributes": {"customer": "acme"},
    }
    assert record().run is None


def test_get_logger_needs_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    with entered(step()):
        get_logger("shop.pay").warning("slow")
    assert (caplog.records[0].trace_id, caplog.records[0].attributes) == ("a" * 32, {"customer": "acme"})


def test_text_is_for_people() -> None:
    with entered(step()):
        assert TextFormatter().format(record()) == "WARNING shop: slow: pay  [run order-42, step charge, attempt 2]"
        line = TextFormatter().format(record("pyworkflow_ray.user"))
    assert line == "pyworkflow_ray WARNING: slow: pay  [run order-42, step charge, attempt 2]"
    assert is_our_line(line)
    assert TextFormatter().format(record()) == "WARNING shop: slow: pay"


def test_json_is_for_machines() -> None:
    with entered(step()):
        text = JsonFormatter().format(record(order=7, level="gold"))
    assert is_our_line(text)
    line = json.loads(text)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING", "logger": "shop", "message": "slow: pay", "run": "order-42", "workflow": "shop:checkout",
        "step": "charge", "attempt": 2, "trace_id": "a" * 32, "span_id": attempt_span_id("uid", "3", 1, 4, 2),
        "attributes": {"customer": "acme"}, "order": 7, "_level": "gold",
    }  # fmt: skip


def test_traceback_and_arguments_that_do_not_fit() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        made = logging.LogRecord(
            "shop", logging.ERROR, "pay.py", 1, "%d", ("x",), (ValueError, error, error.__traceback__)
        )
    line = json.loads(JsonFormatter().format(made))
    assert "arguments do not fit" in line["message"]
    assert line["error"].endswith("ValueError: no")
    assert TextFormatter().format(made).endswith("ValueError: no")


def told(events: list[ev.Event], caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    assert isinstance(events[0], ev.RunCreated)
    narrator = Narrator(events[0], logging.getLogger("pyworkflow_ray.run"))
    caplog.set_level(logging.INFO, "pyworkflow_ray.run")
    for event in events[1:]:
        narrator.tell(event)
    return [(r.levelname, r.getMessage()) for r in caplog.records]


@pytest.mark.parametrize(
    ("kind", "level"), [("transient", "INFO"), ("timeout", "WARNING"), ("permanent", "ERROR"), ("cascade", None)]
)
def test_level_is_the_taxonomys(kind: str, level: str | None, history: Make, make_error: Make, caplog: Any) -> None:
    run = history(attributes={"customer": "acme"}).activated(0).scheduled(0, "charge", max_retries=2)
    run.failed_attempt(1, "1", 1, 0.5, what=make_error("E", "no", kind))
    said = told(run.events, caplog)
    assert said == (
        []
        if level is None
        else [(level, "run order-42, step charge: attempt 1 failed: E: no; next in 500ms (backoff)")]
    )
    if level is not None:
        made = caplog.records[0]
        assert (made.run, made.step, made.attempt, made.attributes) == ("order-42", "charge", 1, {"customer": "acme"})


def test_step_of_an_earlier_activation_is_named_in_a_later_one(history: Make, caplog: Any) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=2)
    narrator = Narrator(run.events[0], logging.getLogger("pyworkflow_ray.run"))
    caplog.set_level(logging.INFO, "pyworkflow_ray.run")
    narrator.remember(run.events)
    assert not caplog.records
    run.activated(5, 1, "wake").failed_attempt(6, "1", 1, 0.5)
    narrator.tell(run.events[-1])
    assert caplog.records[-1].getMessage().startswith("run order-42, step charge: attempt 1 failed")
    assert caplog.records[-1].step == "charge"


def test_step_retried_for_ever_does_not_fill_the_log(history: Make, caplog: Any) -> None:
    run = history().activated(0).scheduled(0, "poll", max_retries=None)
    for attempt in range(1, 1001):
        run.failed_attempt(attempt, "1", attempt, 0.5)
    said = told(run.events, caplog)
    assert len(said) == 10  # 1, 2, 4 ... 512
    assert "attempt 512 failed: ConnectionError: 503 from payments (same error 512×)" in said[-1][1]


def test_losses_and_ends_are_said(history: Make, make_error: Make, caplog: Any) -> None:
    run = history().activated(0).scheduled(0, "charge").add(1, ev.StepLost(position="1", dispatch=1))
    run.activated(2, 1, "recovery").add(3, ev.RunFailed(error=make_error(), position="1"))
    assert told(run.events, caplog) == [
        ("WARNING", "run order-42, step charge: its worker was lost (worker died)"),
        ("WARNING", "run order-42: goes on in epoch 1: its owner was lost"),
        ("ERROR", "run order-42: failed: ConnectionError: 503 from payments"),
    ]
