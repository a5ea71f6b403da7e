"""`explain`: a synthetic history for every state, and what a person is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.view import explain

START = 1_800_000_000.0
Make = Callable[..., Any]


def at(history: Any, second: float, **extra: Any) -> Any:
    return explain(history.events, START + second, **extra)


def test_retrying_run_reads_as_specified(retrying: Any) -> None:
    assert str(at(retrying, 425)) == (
        "order-42  checkout v3   started 08:00:00 UTC, 7m 5s ago\n"
        "⟳ retrying  charge, attempt 4 of 6 failed 14s ago\n"
        "  why   transient · ConnectionError: 503 from payments   (same error 4×)   shop/pay.py:31 in charge\n"
        "  next  attempt 5 in 3m 12s (08:10:17) [backoff 3m 26s], attempt 6 about 08:18:17, then charge fails\n"
        "STEP        STATE  TRIES  LOST    TOOK  OUTCOME\n"
        '1 validate  ✓          1     0    12ms  "ok"\n'
        '2 reserve   ✓          2     1    4.1s  "ok"\n'
        "3 charge    ⟳ 4/6      4     0  6m 41s  ConnectionError: 503 from payments\n"
        "do     runs timeline order-42 · runs events order-42 --step 3 · runs cancel order-42"
    )


def test_retrying_row_of_a_list(retrying: Any) -> None:
    row = at(retrying, 425).row
    assert (row.state, row.step, row.why, row.next) == (
        "retrying 4/6",
        "charge",
        "ConnectionError: 503 from payments",
        "attempt 5 in 3m 12s",
    )


def test_running_retry_says_since_when(retrying: Any) -> None:
    retrying.started(617, "3", 5)
    view = at(retrying, 620)
    assert view.state == "retrying"
    assert view.row.state == "retrying 5/6"
    assert view.next is not None
    assert view.next.startswith("attempt 5 runs since 3s, attempt 6 about")


def test_last_attempt_is_named_as_the_last(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=1).failed_attempt(1, "1", 1, 5)
    assert at(run, 2).next == "attempt 2 in 4s (08:00:06) [backoff 5s], the last one; if it fails, charge fails"


def test_endless_retries_promise_no_end(history: Make) -> None:
    run = history().activated(0).scheduled(0, "poll", max_retries=None).failed_attempt(1, "1", 1, 5)
    view = at(run, 2)
    assert view.verdict == "retrying  poll, attempt 1 failed 1s ago"
    assert view.row.state == "retrying 1/∞"
    assert str(view.next).endswith("then again for ever")


def test_the_first_failure_is_named_beside_the_last(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=5)
    run.failed_attempt(1, "1", 1, 1, what=make_error("TimeoutError", "took 1s", "timeout"))
    run.failed_attempt(3, "1", 2, 1).failed_attempt(5, "1", 3, 1)
    assert at(run, 5.5).why == (
        "transient · ConnectionError: 503 from payments   (same error 2×)   (first: TimeoutError: took 1s)"
        "   shop/pay.py:31 in charge"
    )
    assert [(e.type, e.count) for e in at(run, 5.5).steps[0].errors] == [("TimeoutError", 1), ("ConnectionError", 2)]


def test_failed_run_names_the_command_that_goes_on(history: Make, make_error: Make) -> None:
    declined = make_error("CardDeclined", "insufficient\nfunds", "permanent")
    run = history().activated(0).scheduled(0, "charge", max_retries=3).failed_attempt(1, "1", 1, None, what=declined)
    run.add(1, ev.StepFailed(position="1", dispatch=1, attempt=1, error=declined, why="permanent"))
    run.add(1, ev.RunFailed(error=declined, position="1"))
    view = at(run, 541)
    assert (view.status, view.state, view.verdict) == ("failed", "failed", "failed in charge")
    assert view.why == (
        "permanent · CardDeclined: insufficient funds   shop/pay.py:31 in charge   permanent: not retried"
    )
    assert view.next == "nothing by itself; pyworkflow-ray runs resume order-42 goes on from the failed step"
    assert view.commands[0] == "runs resume order-42"
    assert view.error is not None
    assert view.error.type == "CardDeclined"
    assert view.steps[0].state == "failed"


def test_failure_of_the_body_is_not_blamed_on_a_step(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").completed_step(1, "1")
    run.add(1, ev.RunFailed(error=make_error("KeyError", "'x'", "permanent")))
    view = at(run, 2)
    assert view.verdict == "failed in the workflow's own code"
    assert view.row.step is None
    assert view.next == "nothing by itself; correct the code, then pyworkflow-ray runs rerun order-42 begins anew"
    assert not [command for command in view.commands if "resume" in command]  # which would refuse it


def test_resume_of_a_failed_run_begins_its_tries_anew(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=1)
    run.failed_attempt(1, "1", 1, 1).failed_attempt(3, "1", 2, None)
    run.add(3, ev.StepFailed(position="1", dispatch=1, attempt=2, error=make_error()))
    run.add(3, ev.RunFailed(error=make_error(), position="1"))
    run.activated(50, 1, "resume", resets=["1"]).started(50.1, "1", 1)
    view = at(run, 51)
    assert (view.status, view.state, view.error, view.ended_at) == ("running", "running", None, None)
    assert (view.steps[0].tries, len(view.steps[0].attempts)) == (1, 3)
    run.completed_step(52, "1", 1).add(52, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    assert at(run, 53).status == "completed"
    assert at(run, 53).steps[0].error is None


def test_parked_run_says_when_it_wakes(history: Make) -> None:
    run = history().activated(0).add(1, ev.TimerStarted(position="1", due_at=START + 170_000, delay_s=169_999))
    run.add(1, ev.RunParked(due_at=START + 170_000))
    view = at(run, 7200)
    assert (view.status, view.state, view.verdict) == ("parked", "parked", "parked until Sun 17 Jan 07:13:20 UTC")
    assert view.next == "wakes in 1d 21h (Sun 17 Jan 07:13:20)"
    assert (view.row.why, view.row.next) == ("sleeps", "wakes in 1d 21h")


def test_run_parked_for_a_far_retry_is_retrying(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=3).failed_attempt(1, "1", 1, 3600)
    run.add(1, ev.StepHandedBack(position="1", dispatch=1, due_at=START + 3601)).add(
        1, ev.RunParked(due_at=START + 3601)
    )
    view = at(run, 60)
    assert (view.status, view.state) == ("parked", "retrying")
    assert str(view.next).startswith("attempt 2 in 59m 1s")


def test_attempt_that_an_open_breaker_puts_off_is_not_said_to_wait_for_its_own_delay(history: Make) -> None:
    run = history().activated(0).scheduled(0, "pay", max_retries=3, retry_delay_s=0.25, breaker="payments")
    run.failed_attempt(1, "1", 1, 0.25, reason="fixed")
    assert str(at(run, 1.125).next).startswith("attempt 2 in 125ms (08:00:01) [fixed 250ms]")
    run.add(1.5, ev.StepHandedBack(position="1", dispatch=1, due_at=START + 41)).add(
        1.5, ev.RunParked(due_at=START + 41)
    )
    view = at(run, 21)
    assert view.state == "retrying"
    assert (
        view.next == "attempt 2 in 20s (08:00:41), 2 more after it, then pay fails; breaker payments is open until then"
    )
    assert [(s.kind, s.end.second) for s in view.steps[0].segments][1:] == [("waited", 21)]
    assert "open" not in str(at(run, 42).next)


def test_parked_run_without_an_owner_does_not_promise_to_wake(history: Make) -> None:
    run = history().activated(0).add(1, ev.RunParked(due_at=START + 3600))
    view = at(run, 60, owner_alive=False)
    assert view.state == "parked"
    assert str(view.next).startswith("its owner is gone: pyworkflow-ray recover takes it up")
    assert "recover" in view.commands


def test_parked_run_that_nobody_woke_is_stuck(history: Make) -> None:
    run = history().activated(0).add(1, ev.RunParked(due_at=START + 60))
    assert at(run, 61).state == "parked"
    view = at(run, 160)
    assert (view.state, view.why) == ("stuck", "was due 1m 40s ago and nobody woke it")


def test_paused_run_tells_the_story_and_the_command(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge")
    run.add(1, ev.RunPaused(reason="nondeterminism", message="position 3: recorded 'charge', called 'refund'."))
    view = at(run, 2)
    assert (view.status, view.state) == ("paused", "paused")
    assert view.verdict == "paused: the code no longer does what the history says"
    assert view.why == "position 3: recorded 'charge', called 'refund'."
    assert view.next == "nothing by itself; then pyworkflow-ray runs resume order-42"


def test_completed_run_counts_retries_and_recoveries(retrying: Any) -> None:
    retrying.completed_step(620, "3", 5, result={"id": 7})
    retrying.add(620, ev.RunCompleted(result=ev.Payload(enc="json", data={"id": 7}, size=8)))
    view = at(retrying, 640)
    assert view.verdict == "completed (5 retries, 1 recovery)"
    assert view.result == {"id": 7}
    assert view.next is None
    assert view.steps[2].state == "completed"


def test_failed_step_of_a_completed_run_is_told(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(0, "primary").failed_attempt(1, "1", 1, None)
    run.add(1, ev.StepFailed(position="1", dispatch=1, attempt=1, error=make_error(), why="exhausted"))
    run.scheduled(1, "fallback").completed_step(2, "2").add(2, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    assert at(run, 3).why == "2 steps in 2s, primary failed (ConnectionError) and was dealt with"


def test_cancelled_run_gives_the_reason_and_ends_its_steps(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").started(1, "1")
    run.add(2, ev.RunCancelRequested(reason="customer called"))
    assert at(run, 2.5).verdict.endswith(", being cancelled")
    run.add(3, ev.RunCancelled(reason="customer called"))
    view = at(run, 5)
    assert (view.status, view.verdict, view.why) == ("cancelled", "cancelled 2s ago", "customer called")
    assert view.steps[0].state == "cancelled"


def test_pending_run_that_nobody_takes_up_is_stuck(history: Make) -> None:
    assert at(history(), 5).state == "pending"
    assert at(history(), 31).why == "created 31s ago and taken up by nobody"


def test_step_queued_for_a_worker_is_waiting_not_running(history: Make) -> None:
    view = at(history().activated(0).scheduled(1, "charge"), 13)
    assert (view.state, view.verdict, view.why) == (
        "waiting",
        "waiting: charge is queued for a worker",
        "no worker was free for 12s",
    )
    assert [(s.kind, s.open) for s in view.steps[0].segments] == [("queued", True)]


def test_short_sleep_is_waiting(history: Make) -> None:
    run = history().activated(0).add(1, ev.TimerStarted(position="1", due_at=START + 5, delay_s=4))
    view = at(run, 2)
    assert (view.state, view.next) == ("waiting", "goes on in 3s (08:00:05)")


def test_running_step_names_its_timeout(history: Make) -> None:
    view = at(history().activated(0).scheduled(0, "charge", timeout_s=30).started(1, "1"), 5)
    assert (view.state, view.verdict) == ("running", "running charge")
    assert view.next == "its outcome, or its timeout in 26s (08:00:31)"


@pytest.mark.parametrize(("policy", "quiet_until"), [({"timeout_s": 5}, 36), ({}, 601)])
def test_attempt_without_a_word_is_stuck(history: Make, policy: dict[str, Any], quiet_until: float) -> None:
    run = history().activated(0).scheduled(0, "charge", **policy).started(1, "1")
    assert at(run, quiet_until - 1).state == "running"
    view = at(run, quiet_until + 1)
    assert view.state == "stuck"
    assert "charge, attempt 1, runs for" in str(view.why)


def test_run_whose_owner_is_gone_is_stuck_at_once(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").started(1, "1")
    view = at(run, 2, owner_alive=False)
    assert (view.state, view.verdict) == ("stuck", "stuck, its owner is gone")
    assert "pyworkflow-ray recover" in str(view.next)
    assert at(run, 2, owner_alive=True).state == "running"


def test_late_retry_is_stuck(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=2).failed_attempt(1, "1", 1, 10)
    assert at(run, 12).state == "retrying"
    assert at(run, 60).why == "charge: an attempt was due 49s ago and has not begun"


def test_case_10_lost_workers_are_counted_apart_from_retries(retrying: Any) -> None:
    reserve = at(retrying, 425).steps[1]
    assert (reserve.tries, reserve.lost, reserve.state) == (2, 1, "completed")
    assert [(a.attempt, a.dispatch, a.status) for a in reserve.attempts] == [
        (1, 1, "failed"),
        (2, 1, "lost"),
        (2, 2, "succeeded"),
    ]


def test_case_10_attempt_lost_with_its_owner_is_found_without_an_event(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge").started(1, "1")
    run.activated(10, 1, "recovery", charged=True).started(11, "1").completed_step(12, "1", took=1)
    run.add(12, ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
    view = at(run, 13)
    assert (view.steps[0].tries, view.steps[0].lost, view.recoveries, view.retries) == (1, 1, 1, 0)
    assert view.verdict == "completed (1 recovery)"


def test_same_dispatch_number_of_another_epoch_is_another_attempt(history: Make) -> None:
    run = history().activated(0).scheduled(0, "charge", max_retries=3).failed_attempt(1, "1", 1, 1)
    run.activated(10, 1, "recovery").started(11, "1", 2).completed_step(12, "1", 2)
    assert [(a.epoch, a.attempt, a.status) for a in at(run, 13).steps[0].attempts] == [
        (0, 1, "failed"),
        (1, 2, "succeeded"),
    ]


def test_segments_show_queue_run_wait_and_never_overlap(retrying: Any) -> None:
    for step in at(retrying, 425).steps:
        ends = [step.scheduled_at]
        for segment in step.segments:
            assert segment.start >= ends[-1]
            assert segment.end >= segment.start
            ends.append(segment.end)
    kinds = [s.kind for s in at(retrying, 425).steps[1].segments]
    assert kinds == ["failed", "waited", "lost", "queued", "succeeded"]


def test_long_values_are_named_by_size(history: Make) -> None:
    run = history().activated(0)
    run.add(1, ev.RunCompleted(result=ev.Payload(enc="json", data="x" * 500, size=502)))
    view = at(run, 2)
    assert view.output is not None
    assert not view.output.complete
    assert "502 bytes: pyworkflow-ray runs show order-42 --json" in str(view)
    assert view.result == "x" * 500


def test_models_and_pickles_have_readable_previews(history: Make) -> None:
    model = ev.Payload(enc="model", cls="shop:Order", data={"id": 42, "who": "é"}, size=20)
    pickled = ev.Payload(enc="pickle", cls="shop:Cart", data="gASV", size=2_100_000)
    view = at(history(args=[model, pickled]), 1)
    assert [v.text for v in view.input] == ['Order(id=42, who="é")', "<Cart, 2.1 MB>"]


def test_json_has_the_fixed_fields_and_iso_times(retrying: Any) -> None:
    data = json.loads(at(retrying, 425).model_dump_json())
    fixed = "schema run_id workflow version status state created_at steps result error next".split()
    assert set(fixed) <= set(data)
    assert (data["schema"], data["created_at"]) == (1, "2027-01-15T08:00:00Z")
    assert data["steps"][2]["attempts"][3]["delay_reason"] == "backoff"


def test_torn_tail_is_said(history: Make) -> None:
    assert "the journal's tail is torn" in str(at(history().activated(0), 1, torn=True))


@pytest.mark.parametrize("cut", range(1, 20))
def test_every_prefix_of_a_history_can_be_explained(retrying: Any, cut: int) -> None:
    view = explain(retrying.events[:cut], START + 425)
    assert view.verdict
    assert str(view)
    assert view._repr_html_()


def test_unknown_events_and_steps_are_passed_over(history: Make) -> None:
    run = history().activated(0).add(1, ev.UnknownEvent(type="later")).started(2, "9")
    assert at(run, 3).steps == []


def test_history_without_its_beginning_is_refused() -> None:
    with pytest.raises(ValueError, match="begin with run_created"):
        explain([], 0)
    with pytest.raises(ValueError, match="begin with run_created"):
        explain([ev.RunActivated(epoch=0)], 0)


def test_same_input_gives_the_same_view(retrying: Any) -> None:
    assert at(retrying, 425) == at(retrying, 425)


def test_failed_run_that_was_undone_names_rerun_and_marks_its_compensations(history: Make, make_error: Make) -> None:
    run = history().activated(0).scheduled(1, "shop:charge")
    run.add(2, ev.StepFailed(position="1", dispatch=1, attempt=1, error=make_error(), why="permanent"))
    code = ev.CodeRef(how="import", name="refund")
    run.add(2, ev.StepScheduled(position="2", number=2, step="shop:refund", code=code, compensates=True))
    run.add(3, ev.RunFailed(error=make_error(), position="1"))
    view = explain(run.events, START + 9)
    assert [step.name for step in view.steps] == ["charge", "refund (compensation)"]
    assert view.next == "nothing by itself: what it did is undone; pyworkflow-ray runs rerun order-42 begins anew"
    assert "runs rerun order-42" in view.commands
    assert "runs resume order-42" not in view.commands
