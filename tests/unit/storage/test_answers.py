"""The ready answers, against runs whose failures, losses and refusals are known to the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyworkflow_ray.answers import answer_sql
from pyworkflow_ray.cli.sql import NAMES
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.resilience.retry import RetryPolicy
from pyworkflow_ray.storage.answers import ANSWERS
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.sql import rows
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created

AT = 1_790_000_000.0
CODE = ev.CodeRef(how="import", name="flow")


def error(name: str, kind: str = "transient") -> ev.ErrorInfo:
    return ev.ErrorInfo(kind=kind, type=name, message=name)  # type: ignore[arg-type]


def write(storage: Storage, run_id: str, at: float, epochs: list[list[ev.Event]]) -> None:
    storage.create_run(created(run_id, storage.storage_id, at=at, workflow="m:shop"))
    seq = 0
    for epoch, events in enumerate(epochs):
        journal, _ = storage.activate(run_id, "", first=epoch == 0)
        numbered = [event.model_copy(update={"seq": seq + i}) for i, event in enumerate(events, 1)]
        seq += len(events)
        journal.append(numbered).result()
        journal.finish() if epoch == len(epochs) - 1 else journal.close()


def scheduled(at: float, step: str, position: str = "1", breaker: str | None = None, retries: int = 5) -> ev.Event:
    policy = RetryPolicy(max_retries=retries)
    return ev.StepScheduled(
        at=at, position=position, number=int(position), step=step, code=CODE, policy=policy, breaker=breaker
    )


def failed(at: float, attempt: int, name: str, *, took: float, delay: float | None, **fields: Any) -> ev.Event:
    return ev.AttemptFailed(
        at=at, position=fields.pop("position", "1"), dispatch=1, attempt=attempt, started_at=at - took, ended_at=at,
        error=error(name, fields.pop("kind", "transient")), delay_s=delay, **fields,
    )  # fmt: skip


def done(at: float, attempt: int, *, took: float, dispatch: int = 1, node: str = "n1") -> list[ev.Event]:
    payload = ev.Payload(enc="json", data=1)
    completed = ev.StepCompleted(
        at=at, position="1", dispatch=dispatch, attempt=attempt, started_at=at - took, ended_at=at, result=payload,
        node=node,
    )  # fmt: skip
    return [completed, ev.RunCompleted(at=at, result=payload)]


def begun(at: float, epoch: int = 0) -> ev.Event:
    return ev.RunActivated(at=at, epoch=epoch, cause="recovery" if epoch else "start")


def started(at: float, dispatch: int, node: str) -> ev.Event:
    return ev.StepStarted(at=at, position="1", dispatch=dispatch, attempt=1, started_at=at, node=node, worker="w")


@pytest.fixture
def asked(storage: Storage) -> Callable[..., list[tuple[Any, ...]]]:
    """Five runs: one retried, one whose node died, one whose owner was lost, two refused by a breaker."""
    write(
        storage, "retried", AT,
        [[begun(AT), scheduled(AT, "charge"), failed(AT + 3, 1, "ConnectionError", took=3, delay=2, node="n1"),
          failed(AT + 6, 2, "TimeoutError", took=1, delay=4, node="n2"), *done(AT + 16, 3, took=6)]],
    )  # fmt: skip
    write(
        storage, "node-lost", AT + 100,
        [[begun(AT + 100), scheduled(AT + 100, "charge"), started(AT + 101, 1, "n9"),
          ev.StepLost(at=AT + 111, position="1", dispatch=1, attempt=1, cause="node_lost"),
          started(AT + 113, 2, "n1"), *done(AT + 114, 1, took=1, dispatch=2)]],
    )  # fmt: skip
    write(
        storage, "owner-lost", AT + 1200,
        [[begun(AT + 1200), scheduled(AT + 1200, "pack"), started(AT + 1201, 1, "n9")],
         [begun(AT + 1208, 1), *done(AT + 1210, 1, took=1)]],
    )  # fmt: skip
    refused = {"kind": "cascade", "took": 0.0, "delay": None, "breaker": "open", "why": "refused"}
    for number, before in enumerate((2, 0)):
        at = AT + 300 + number * 10
        tries = [failed(at + 1 + i, 1 + i, "ConnectionError", took=1, delay=1, node="n1") for i in range(before)]
        end = [
            failed(at + 5, before + 1, "CircuitOpenError", **refused),
            ev.StepFailed(
                at=at + 5, position="1", dispatch=1, attempt=before + 1, error=error("CircuitOpenError"), why="refused"
            ),
            ev.RunFailed(at=at + 5, error=error("CircuitOpenError"), position="1"),
        ]
        write(storage, f"refused-{number}", at, [[begun(at), scheduled(at, "pay", breaker="bank"), *tries, *end]])

    def ask(name: str, since: float | None = None, **options: Any) -> list[tuple[Any, ...]]:
        return rows(storage, answer_sql(name, since, **options))[1]

    return ask


def test_failures_are_told_by_step_and_error(asked: Any) -> None:
    found = {(step, name): rest for step, _, name, *rest in asked("failures")}
    # failures, attempts of the step (a lost one is neither), rate, steps that ended of it
    assert found == {
        ("charge", "ConnectionError"): [1, 4, 0.25, 0],
        ("charge", "TimeoutError"): [1, 4, 0.25, 0],
        ("pay", "ConnectionError"): [2, 4, 0.5, 0],
        ("pay", "CircuitOpenError"): [2, 4, 0.5, 2],
    }
    assert [row[0] for row in asked("failures", AT + 250)] == ["pay", "pay"]


def test_retries_tell_the_time_that_was_lost(asked: Any) -> None:
    found = {step: rest for step, *rest in asked("retries")}
    # attempts, failed, seconds in failed ones, seconds waited, share
    assert found["charge"] == [5, 2, 4.0, 6.0, round(4 / (4 + 6 + 10 + 1), 4)]
    assert found["pay"] == [4, 4, 2.0, 2.0, 1.0]
    assert "pack" not in found


def test_slowest_steps_come_first_with_their_slowest_run(asked: Any) -> None:
    found = asked("slowest")
    assert found[0] == ("charge", 2, 14.5, pytest.approx(15.85), 16.0, "retried")
    assert len(asked("slowest", limit=1)) == 1


def test_recovery_is_timed_from_loss_to_the_next_attempt_and_owner(asked: Any) -> None:
    found = {(what, cause): rest for what, cause, *rest in asked("recovery")}
    assert found[("step", "node_lost")] == [1, 1, 2.0, 2.0, 2.0]
    assert found[("run", "run_actor_lost")] == [1, 1, 7.0, 7.0, 7.0]


def test_nodes_are_ordered_by_their_share_of_failures(asked: Any) -> None:
    found = {node: rest for node, *rest in asked("nodes")}
    assert found["n9"] == [2, 0, 2, 1.0, None]
    assert found["n2"] == [1, 1, 0, 1.0, "TimeoutError"]
    assert found["n1"][0:3] == [6, 3, 0]


def test_breakers_saved_the_attempts_that_were_left(asked: Any) -> None:
    """Of six each, two were made by the first run and none by the second."""
    assert asked("breakers") == [("bank", 2, 2, 4 + 6)]


def test_what_was_running_when_a_node_died(asked: Any) -> None:
    (one,) = asked("died")
    assert (one[0], *one[2:]) == ("n9", "node-lost", "charge", 1, "node_lost", 10.0, "completed", "completed")
    assert [row[2] for row in asked("died", node="n9")] == ["owner-lost", "node-lost"]
    assert asked("died", node="'; drop table runs; --") == []


def test_overview_counts_runs_by_workflow_and_status(asked: Any) -> None:
    assert [row[:3] for row in asked("overview")] == [("m:shop", "completed", 3), ("m:shop", "failed", 2)]


def test_answers_are_the_same_after_compaction(asked: Any, storage: Storage) -> None:
    before = {name: asked(name) for name in ANSWERS}
    assert compact(storage).runs == 3
    assert {name: asked(name) for name in ANSWERS} == before


def test_unknown_answers_and_limits_are_refused() -> None:
    assert tuple(ANSWERS) == NAMES
    with pytest.raises(ConfigurationError, match="no answer 'nosuch'"):
        answer_sql("nosuch", None)
    with pytest.raises(ConfigurationError, match="limit"):
        answer_sql("slowest", None, limit=0)
