"""Runs on a real Ray, end to end, judged by results, event logs and ledgers that the steps wrote."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import flows
import pytest
from processes import until

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import AttemptsFailed, RunActivated, StepLost

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("runtime")]


def test_a_run_goes_through_sync_async_and_local_steps() -> None:
    handle = pw.start(flows.three, 5)
    assert handle.result(60) == 11
    assert handle.status() == "completed" == pw.RunStatus.COMPLETED
    assert handle.done()
    events = handle.events()
    assert [event.seq for event in events] == list(range(len(events)))
    assert [event.type for event in events][:3] == ["run_created", "run_activated", "step_scheduled"]
    owner = next(e.worker for e in events if isinstance(e, RunActivated))
    workers = {e.position: e.worker for e in events if e.type == "step_completed"}
    assert workers["3"] == owner  # the local step
    assert workers["1"] != owner
    assert len(handle.steps()) == 3
    assert handle.explain().status == "completed"


def test_local_async_steps_share_the_run_actors_process() -> None:
    results = pw.run(flows.locals_only, 6)
    assert [x for x, _ in results] == list(range(6))
    assert len({pid for _, pid in results}) == 1
    assert results[0][1] != os.getpid()


def test_failed_attempts_are_repeated_and_permanent_ones_are_not(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    handle = pw.start(flows.retrying, str(ledger))
    assert handle.result(60) == (3, "never")
    assert flows.lines(ledger) == ["attempt 1", "attempt 2", "attempt 3", "permanent"]
    flaky, never = handle.steps()
    assert [(a.attempt, a.error and a.error.type) for a in flaky.attempts] == [
        (1, "ConnectionError"),
        (2, "ConnectionError"),
        (3, None),
    ]
    assert [(a.attempt, a.error and a.error.type) for a in never.attempts] == [(1, "ValueError")]
    assert len([e for e in handle.events() if isinstance(e, AttemptsFailed)]) == 1  # fast ones are one event


@pytest.mark.parametrize(("which", "expected"), [("httpx", ("httpx", 404)), ("keyword", ("keyword", 7))])
def test_a_workflow_catches_the_steps_own_exception_whole(which: str, expected: tuple[str, int]) -> None:
    assert pw.run(flows.catches, which) == expected


def test_a_failed_run_raises_the_steps_own_exception_with_notes() -> None:
    handle = pw.start(flows.lets_through)
    with pytest.raises(flows.KeywordOnly) as caught:
        handle.result(60)
    assert caught.value.code == 7
    assert isinstance(caught.value.__cause__, KeyError)
    assert any(handle.run_id in text and "raises_whole" in text for text in caught.value.__notes__)
    assert handle.status() == "failed"


@pytest.mark.parametrize("which", ["async", "sync", "c"])
def test_a_timeout_ends_what_runs_and_the_pool_is_healthy_after(which: str) -> None:
    assert pw.start(flows.timeouts, which).result(60) == "StepTimeoutError"
    assert pw.start(flows.three, 1).result(60) == 3


def test_a_sleeping_run_is_parked_and_holds_no_actor() -> None:
    handle = pw.start(flows.sleeper, 2.5)
    until(lambda: handle.status() == "parked", "it is parked")
    assert pw.run(flows.three, 2) == 5  # actors are free meanwhile
    assert handle.result(60) == 3
    causes = [e.cause for e in handle.events() if isinstance(e, RunActivated)]
    assert causes == ["start", "wake"]


def test_a_cancelled_run_cleans_up_and_stops_its_step(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    handle = pw.start(flows.cancellable, str(ledger))
    until(lambda: flows.lines(ledger), "the step has begun")
    handle.cancel("not wanted")
    with pytest.raises(pw.RunCancelledError) as caught:
        handle.result(60)
    assert caught.value.reason == "not wanted"
    assert handle.status() == "cancelled"
    until(lambda: len(flows.lines(ledger)) == 3, "the step has seen its cancellation")
    assert set(flows.lines(ledger)) == {"begun", "cancelled", "cleaned"}


def test_a_parked_run_can_be_cancelled() -> None:
    handle = pw.start(flows.sleeper, 3600)
    until(lambda: handle.status() == "parked", "it is parked")
    handle.cancel()
    with pytest.raises(pw.RunCancelledError):
        handle.result(60)


def test_an_id_started_twice_is_one_run_and_other_arguments_are_refused() -> None:
    flow = flows.three.options(run_id="order-42", attributes={"shop": 3})
    first = pw.start(flow, 1)
    assert pw.start(flow, x=1) == first
    assert first.result(60) == 3
    assert pw.start(flow, 1).result(60) == 3
    with pytest.raises(pw.RunExistsError, match="order-42"):
        pw.start(flow, 2)
    with pytest.raises(pw.RunExistsError, match="workflow"):
        pw.start(flows.sleeper.options(run_id="order-42"), 1)
    assert pw.list_runs(attributes={"shop": 3}) == [first]
    assert pw.get_run("order-42") == first
    with pytest.raises(pw.RunNotFoundError):
        pw.get_run("order-43")


def test_many_runs_are_started_at_once_and_seen_as_they_end() -> None:
    handles = pw.start_many(flows.three, [(i,) for i in range(30)] + [{"x": 30}])
    assert {handle.run_id for handle in pw.as_completed(handles, timeout=120)} == {h.run_id for h in handles}
    assert [handle.result(60) for handle in handles] == [2 * i + 1 for i in range(31)]


async def test_handles_are_awaitable_in_a_running_loop() -> None:
    handle = await pw.start_async(flows.three, 4)
    assert await asyncio.wait_for(handle, 60) == 9


def test_waiting_ends_with_the_builtin_timeout_and_the_run_goes_on(tmp_path: Path) -> None:
    handle = pw.start(flows.ten, str(tmp_path / "ledger"), str(tmp_path / "gate"), 0)
    with pytest.raises(TimeoutError) as caught:
        handle.result(0.05)
    assert type(caught.value) is TimeoutError
    (tmp_path / "gate").touch()
    assert handle.result(60) == 45


def test_wrong_arguments_start_nothing() -> None:
    before = len(pw.list_runs())
    with pytest.raises(TypeError):
        pw.start(flows.three)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="integer"):
        pw.start(flows.three, "seven")  # type: ignore[arg-type]
    with pytest.raises(pw.ConfigurationError):
        pw.start(flows.three.options(run_id="../escape"), 1)
    assert len(pw.list_runs()) == before


def test_case_10_a_lost_step_worker_is_a_recovery_and_no_retry(tmp_path: Path) -> None:
    from processes import kill

    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(flows.ten, str(ledger), str(gate), 3)
    until(lambda: len(flows.lines(ledger)) == 4, "step 3 runs")
    kill(int(flows.lines(ledger)[3].split()[1]))
    until(lambda: len(flows.lines(ledger)) == 5, "step 3 runs again")
    gate.touch()
    assert handle.result(60) == 45
    lost = [e for e in handle.events() if isinstance(e, StepLost)]
    assert [(e.cause, e.charged) for e in lost] == [("worker_died", True)]
    assert [line.split()[0] for line in flows.lines(ledger)] == ["0", "1", "2", "3", "3", "4", "5", "6", "7", "8", "9"]
    fences = [tuple(map(int, line.split()[2].split("-"))) for line in flows.lines(ledger)[3:5]]
    assert fences[0] < fences[1]


def test_a_step_that_is_not_idempotent_is_never_executed_again(tmp_path: Path) -> None:
    from processes import kill

    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(flows.not_idempotent, str(ledger), str(gate))
    until(lambda: flows.lines(ledger), "the step runs")
    kill(int(flows.lines(ledger)[0].split()[1]))
    assert handle.result(60) == "lost"
    assert len(flows.lines(ledger)) == 1


def test_a_failed_run_is_resumed_from_its_failed_step(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    handle = pw.start(flows.flagged, str(flag), False)
    with pytest.raises(ValueError, match="no flag"):
        handle.result(60)
    flag.touch()
    assert pw.resume(handle.run_id).result(60) == "ok"  # and never the failure of before
    assert handle.status() == "completed"
    before = len(handle.events())
    pw.resume(handle.run_id)
    assert pw.run(flows.three, 1) == 3
    assert len(handle.events()) == before  # a completed run is left alone


def test_a_far_retry_parks_the_run_and_is_woken(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    handle = pw.start(flows.flagged, str(flag), True)
    until(lambda: handle.status() == "parked", "it is parked")
    flag.touch()
    pw.wake(handle.run_id)
    assert handle.result(60) == "ok"


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1:1"])
def test_an_address_that_is_no_clusters_gets_one_clear_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pyworkflow_ray.runtime.embedded import ensure_ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(pw.ConfigurationError, match=r"^address='[^\n]*$"):
        ensure_ray(address)
