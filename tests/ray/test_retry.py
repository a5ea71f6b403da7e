"""Retries on a real Ray: what a run takes along to its workers, pauses, wakes, and a budget that processes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import retry_flows
from flows import lines, note
from processes import until

import pyworkflow_ray as pw
from pyworkflow_ray.execution import hooks
from pyworkflow_ray.resilience import taxonomy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("runtime")]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    own = {event: list(known) for event, known in hooks._own.items()}
    yield
    hooks._own.update(own)
    taxonomy._own_kinds.clear()
    taxonomy._refresh()


def test_kinds_and_hooks_go_with_the_run_to_its_workers(tmp_path: Path) -> None:
    ledger, told = str(tmp_path / "ledger"), str(tmp_path / "told")
    with pytest.raises(retry_flows.Busy):
        pw.run(retry_flows.asks, ledger)
    assert lines(Path(ledger)) == ["attempt 1"]
    pw.register_kind(retry_flows.Busy, "transient")
    pw.on_retry(lambda event: note(told, f"{event.run_id} {event.attempt} {event.kind} {event.error}"))
    pw.on_run_failed(lambda event: note(told, f"{event.run_id} failed of {event.error}"))
    assert pw.run(retry_flows.asks.options(run_id="kinds-1"), ledger) == 3
    assert lines(Path(told)) == ["kinds-1 1 transient busy", "kinds-1 2 transient busy"]
    taxonomy._own_kinds.clear()
    with pytest.raises(retry_flows.Busy):
        pw.run(retry_flows.asks.options(run_id="kinds-2"), ledger)
    assert lines(Path(told))[2:] == ["kinds-2 failed of busy"]


def test_case_13_a_step_that_used_up_its_attempts_pauses_its_run_and_a_resume_grants_fresh_ones(tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(retry_flows.careful, str(ledger), str(gate))
    until(lambda: handle.status() == "paused", "it is paused")
    assert "the service is not there" in handle.explain().why
    pw.resume(handle.run_id)
    until(lambda: len(lines(ledger)) == 4 and handle.status() == "paused", "it has paused again")
    gate.touch()
    pw.resume(handle.run_id)
    assert handle.result(60) == 5
    assert lines(ledger) == [f"attempt {n} after {n - 1}" for n in range(1, 6)]


def test_case_13_a_parked_run_is_paused_by_hand_and_woken_once_it_goes_on(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    handle = pw.start(retry_flows.waits_long, str(ledger))
    until(lambda: handle.status() == "parked", "it is parked")
    pw.pause(handle.run_id)
    until(lambda: handle.status() == "paused", "it is paused")
    pw.wake(handle.run_id)
    time.sleep(0.2)
    assert handle.status() == "paused", "a wake is no resume"
    pw.resume(handle.run_id)
    until(lambda: handle.status() == "parked", "it is parked again")
    pw.wake(handle.run_id)
    assert handle.result(60) == 2
    assert lines(ledger) == ["attempt 1", "attempt 2"]


def test_a_pause_waits_for_the_step_that_runs_and_begins_no_other(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    handle = pw.start(retry_flows.two_slow, str(ledger), 0.7)
    until(lambda: lines(ledger) == ["begun"], "the step runs")
    pw.pause(handle.run_id)
    until(lambda: handle.status() == "paused", "it is paused")
    assert lines(ledger) == ["begun", "ended"]
    pw.resume(handle.run_id)
    assert handle.result(60) == 4


def test_the_total_timeout_ends_a_step_that_is_retried_for_ever() -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        pw.run(retry_flows.bounded)
    assert time.monotonic() - began < 10
    assert any("deadline" in text for text in caught.value.__notes__)


def test_case_11_a_budget_bounds_the_retries_of_all_workers_together(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    pw.RetryBudget("ray-tests", tokens=140)
    assert pw.run(retry_flows.many_hopeless, str(ledger), 4) == ["RetryBudgetExhausted"]
    retries = len(lines(ledger)) - 4
    assert 5 <= retries <= 10, "140 tokens are ten retries, of all processes"


def test_plain_calls_in_a_users_own_ray_actors_draw_on_the_clusters_budget(tmp_path: Path) -> None:
    import ray

    class Caller:  # it knows nothing of runs
        def call(self, ledger: str) -> str:
            from pathlib import Path

            import pyworkflow_ray as pw

            @pw.step(max_retries=100, retry_delay=0, retry_budget=pw.RetryBudget("ray-tests-plain", tokens=140))
            def hopeless() -> None:
                with Path(ledger).open("a") as file:
                    file.write("attempt\n")
                raise ConnectionError("refused")

            hopeless()
            return "no error"

    ledger = tmp_path / "ledger"
    actors = [ray.remote(num_cpus=0)(Caller).remote() for _ in range(2)]
    try:
        for call in [actor.call.remote(str(ledger)) for actor in actors]:
            with pytest.raises(pw.RetryBudgetExhausted):
                ray.get(call, timeout=60)
    finally:
        for actor in actors:
            ray.kill(actor)
    assert len(lines(ledger)) - 2 <= 10, "140 tokens are ten retries, of all processes"
