"""Runs in a real storage, made of events alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.storage.storage import Storage

CODE = ev.CodeRef(how="import", name="flow", module="m", qualname="flow")
ENVIRONMENT = ev.CodeEnvironment(key="k", python="3.11")
BOOM = ev.ErrorInfo(kind="transient", type="ConnectionError", message="no route")
MakeRun = Callable[..., list[ev.Event]]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "storage")


@pytest.fixture
def make_run(storage: Storage) -> MakeRun:
    """make_run(run_id, end=…, at=…) writes a run of one step that failed once, in two epochs; returns its events."""

    def make(run_id: str, *, end: str = "completed", at: float = 1_790_000_000.0) -> list[ev.Event]:
        created = ev.RunCreated(
            seq=0,
            at=at,
            run_id=run_id,
            run_uid=f"uid-{run_id}",
            storage_id=storage.storage_id,
            workflow="m:flow",
            code=CODE,
            environment=ENVIRONMENT,
            attributes={"tenant": "a\u00e9'\"; drop table runs; --"},
        )
        first: list[ev.Event] = [
            ev.RunActivated(seq=1, at=at + 1, epoch=0),
            ev.StepScheduled(seq=2, at=at + 1, position="1", number=1, step="m:charge", code=CODE),
            ev.StepStarted(seq=3, at=at + 2, position="1", dispatch=1, attempt=1, started_at=at + 2, worker="w1"),
            ev.AttemptFailed(
                seq=4,
                at=at + 3,
                position="1",
                dispatch=1,
                attempt=1,
                started_at=at + 2,
                ended_at=at + 3,
                error=BOOM,
                delay_s=1.5,
                delay_reason="fixed",
            ),
        ]
        done = ev.Payload(enc="json", data={"paid": True})
        second: list[ev.Event] = [
            ev.RunActivated(seq=5, at=at + 4, epoch=1, cause="recovery"),
            ev.StepCompleted(
                seq=6, at=at + 6, position="1", dispatch=1, attempt=2, started_at=at + 5, ended_at=at + 6, result=done
            ),
        ]
        if end == "completed":
            second.append(ev.RunCompleted(seq=7, at=at + 7, result=done))
        elif end == "failed":
            second.append(ev.RunFailed(seq=7, at=at + 7, error=BOOM))
        elif end == "cancelled":
            second.append(ev.RunCancelled(seq=7, at=at + 7, reason="enough"))
        storage.create_run(created)
        for number, events in enumerate((first, second)):
            journal, _ = storage.activate(run_id, "", first=number == 0)
            journal.append(events).result()
            if events is second and end != "running":
                journal.finish()
            else:
                journal.close()
        return [created, *first, *second]

    return make
