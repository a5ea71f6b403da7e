"""Alerts as a fold of a run's events: which, once each, and with the same ids whoever reads the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.execution.alerts import alert_of
from pyworkflow_ray.observability.alerts import AlertFold, breaker_opened

Make = Callable[..., Any]


def alerts(events: list[ev.Event]) -> list[dict[str, Any]]:
    assert isinstance(events[0], ev.RunCreated)
    fold = AlertFold(events[0])
    for event in events[1:]:
        fold.apply(event)
    return fold.take()


@pytest.fixture
def failed(history: Make, make_error: Make) -> list[ev.Event]:
    run = history(attributes={"customer": "acme"}).activated(0).scheduled(0, "charge", max_retries=4)
    for attempt in range(1, 5):
        run.failed_attempt(attempt, "1", attempt, 0.5)
    run.failed_attempt(5, "1", 5, None)
    run.add(5, ev.StepFailed(position="1", dispatch=1, attempt=5, error=make_error(), why="exhausted"))
    run.add(5, ev.RunFailed(error=make_error(), position="1"))
    return list(run.events)


def test_run_that_struggles_gives_up_and_fails_is_three_alerts(failed: list[ev.Event]) -> None:
    told = alerts(failed)
    assert [one["what"] for one in told] == ["run_struggling", "attempts_exhausted", "run_failed"]
    assert [one["text"] for one in told] == [
        "run order-42 (checkout) is struggling: step charge has failed 3 times and is tried again: "
        "ConnectionError: 503 from payments",
        "run order-42 (checkout) step charge has no attempt left after 5: ConnectionError: 503 from payments",
        "run order-42 (checkout) failed of step charge: ConnectionError: 503 from payments",
    ]
    alert = alert_of(told[0])
    assert (alert.step, alert.kind, alert.attributes) == ("charge", "transient", {"customer": "acme"})
    assert alert.at.isoformat() == "2027-01-15T08:00:03+00:00"


def test_ids_are_the_logs(failed: list[ev.Event]) -> None:
    ids = [one["id"] for one in alerts(failed)]
    assert len(set(ids)) == 3
    assert [one["id"] for one in alerts(failed)] == ids


def test_owner_that_is_lost_again_and_again_is_a_struggle(history: Make) -> None:
    run = history().activated(0)
    for epoch in range(1, 5):
        run.activated(epoch, epoch, "recovery")
    assert [one["what"] for one in alerts(run.events)] == ["run_struggling"]


def test_step_that_completed_in_time_is_no_alert(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").failed_attempt(1, "1", 1, 1).completed_step(3, "1", 2)
    assert alerts(run.events) == []


def test_breaker_has_an_id_for_each_time_it_opens() -> None:
    one, again = (breaker_opened("pay", "host-7", n, "5 failures in a row", 0.0) for n in (1, 3))
    assert one["text"] == "circuit breaker pay[host-7] opened: 5 failures in a row"
    assert one["id"] != again["id"]
