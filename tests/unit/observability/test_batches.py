"""A map is one row with counts by error type, whatever happens to its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.view import explain

START = 1_800_000_000.0
Make = Callable[..., Any]


def mapped(history: Make, total: int | None = 30, timeout_s: float | None = None, **fields: Any) -> Any:
    run = history().activated(0)
    code = ev.CodeRef(how="import", name="work")
    policy = ev.RetryPolicy(timeout_s=timeout_s)
    run.add(
        1,
        ev.MapScheduled(
            position="1",
            number=1,
            step="shop:work",
            code=code,
            policy=policy,
            chunk_size=10,
            concurrency=2,
            total=total,
        ),
    )
    return run


def chunk(run: Any, second: float, first: int, error: Any = None, failed: int = 0, **fields: Any) -> Any:
    failures = [ev.ItemFailure(index=first + n, error=0, attempt=1) for n in range(failed)]
    return run.add(
        second,
        ev.ChunkCompleted(
            position="1",
            first=first,
            count=10,
            done=10,
            dispatch=1,
            started_at=START + second - 1,
            ended_at=START + second,
            failures=failures,
            errors=[error] if error else [],
            **fields,
        ),
    )


def at(run: Any, second: float) -> Any:
    return explain(run.events, START + second)


def test_a_running_map_says_how_far_it_is_and_what_failed(history: Make, make_error: Make) -> None:
    run = chunk(mapped(history), 5, 10, make_error(), 3, retried={"ConnectionError": 4})
    view = at(run, 6)
    assert (view.state, len(view.steps)) == ("running", 1)
    (step,) = view.steps
    assert (step.name, step.argument, step.state) == ("work", "30 items", "running")
    assert step.outcome == "10 of 30 done, 3 failed (ConnectionError 3), 4 retries"
    assert step.items is not None
    assert (step.items.done, step.items.failed, step.items.by_type) == (10, 3, {"ConnectionError": 3})
    assert view.why == "work: 10 of 30 done, 3 failed (ConnectionError 3), 4 retries, since 5s"


def test_a_map_is_completed_when_all_its_items_are(history: Make) -> None:
    run = mapped(history, total=None)
    for second, first in ((5, 10), (6, 0), (7, 20)):
        chunk(run, second, first, last=first == 20)
    (step,) = at(run, 9).steps
    assert (step.state, step.outcome, step.items.total) == ("completed", "30 of 30 done", 30)
    assert [segment.kind for segment in step.segments] == ["succeeded"]
    (empty,) = at(mapped(history, total=0), 9).steps
    assert empty.state == "completed"


def test_lost_chunks_are_counted_and_the_run_goes_on(history: Make) -> None:
    run = mapped(history)
    run.add(4, ev.StepLost(position="1[0:10]", dispatch=1, retry_at=START + 4, parts=[(0, 5), (5, 5)]))
    run.add(4, ev.StepDispatched(position="1[0:5]", dispatch=2))
    view = at(chunk(run, 5, 10), 6)
    assert (view.state, view.steps[0].lost, view.recoveries) == ("running", 1, 1)


def test_a_map_that_says_nothing_for_long_is_stuck_and_one_that_goes_on_is_not(history: Make) -> None:
    assert at(mapped(history, timeout_s=5), 60).state == "running"  # ten items of a chunk may take 50 s
    assert at(mapped(history, timeout_s=5), 120).state == "stuck"
    assert at(chunk(mapped(history, timeout_s=5), 110, 0), 120).state == "running"


def test_a_map_that_stopped_early_is_cancelled_with_what_was_done(history: Make, make_error: Make) -> None:
    run = chunk(mapped(history), 5, 0, make_error(), 10)
    run.add(5, ev.StepCancelled(position="1"))
    (step,) = at(run, 6).steps
    assert (step.state, step.outcome) == ("cancelled", "cancelled: 10 of 30 done, 10 failed (ConnectionError 10)")


def test_every_prefix_of_a_mapped_run_can_be_explained(history: Make, make_error: Make) -> None:
    run = mapped(history, total=None)
    chunk(run, 5, 0, make_error(), 2)
    run.add(6, ev.StepLost(position="1[10:20]", dispatch=1, retry_at=START + 7))
    chunk(run, 9, 10, last=True)
    run.add(9, ev.RunCompleted(result=ev.Payload(enc="json", data=1, size=1)))
    for cut in range(1, len(run.events) + 1):
        assert explain(run.events[:cut], START + 10).run_id == "order-42"
