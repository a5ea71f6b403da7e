"""A real storage with a run in every state, made through the storage and its journals. No Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pyworkflow_ray.cli.main import cli
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.resilience.policy import RetryPolicy
from pyworkflow_ray.storage.lease import Lease
from pyworkflow_ray.storage.storage import Storage

ROOT = Path(__file__).resolve().parents[2]


def payload(value: Any) -> ev.Payload:
    return ev.Payload(enc="json", data=value, size=len(repr(value)))


def error(type_: str, message: str, kind: str) -> ev.ErrorInfo:
    frame = ev.Frame(file="shop/pay.py", line=31, function="charge")
    return ev.ErrorInfo.model_validate(
        {"kind": kind, "type": type_, "message": message, "where": frame, "traceback": f"Traceback\n{type_}: {message}"}
    )


@dataclass
class Shop:
    """A storage and the runs in it. The `ago` of an event is seconds before now: ages are the same in every test."""

    root: Path
    storage: Storage
    lease: Lease

    def run(
        self,
        run_id: str,
        *events: tuple[float, ev.Event],
        lease: str | None = None,
        finish: bool = False,
        **fields: Any,
    ) -> None:
        now = time.time()
        owner = self.lease.id if lease is None else lease
        created = ev.RunCreated(
            **{
                "seq": 0,
                "at": now - events[0][0],
                "run_id": run_id,
                "run_uid": "u" + run_id,
                "storage_id": self.storage.storage_id,
                "workflow": "shop.flows:checkout",
                "version": "3",
                "code": ev.CodeRef(how="import", name="checkout"),
                "environment": ev.CodeEnvironment(key="k", python="3.11"),
                "kwargs": {"order_id": payload(run_id)},
                **fields,
            }
        )
        self.storage.create_run(created, lease=owner)
        journal, _ = self.storage.activate(run_id, owner, first=True)
        numbered = [e.model_copy(update={"seq": i, "at": now - ago}) for i, (ago, e) in enumerate(events, start=1)]
        journal.append(numbered).result(timeout=10)
        if finish:
            journal.finish()
        journal.close()

    def journal_of(self, run_id: str) -> Path:
        return next(self.root.glob(f"runs/*/{run_id}/*.journal"))


def scheduled(number: int, step: str, **policy: Any) -> ev.StepScheduled:
    return ev.StepScheduled(
        position=str(number),
        number=number,
        step=f"shop.steps:{step}",
        code=ev.CodeRef(how="import", name=step),
        args=[payload("order")],
        policy=RetryPolicy(**policy),
    )


def failed_attempt(
    ago: float, position: str, attempt: int, delay_s: float | None, what: ev.ErrorInfo
) -> ev.AttemptFailed:
    at = time.time() - ago
    return ev.AttemptFailed(
        position=position,
        dispatch=1,
        attempt=attempt,
        started_at=at - 0.5,
        ended_at=at,
        error=what,
        delay_s=delay_s,
        delay_reason="backoff" if delay_s is not None else None,
        retry_at=None if delay_s is None else at + delay_s,
    )


def completed_step(ago: float, position: str, result: Any = "ok") -> ev.StepCompleted:
    at = time.time() - ago
    return ev.StepCompleted(
        position=position, dispatch=1, attempt=1, started_at=at - 0.25, ended_at=at, result=payload(result)
    )


BUSY = error("ConnectionError", "503 from payments", "transient")
DECLINED = error("CardDeclined", "insufficient funds", "permanent")


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Shop]:
    storage = Storage.open(tmp_path / "storage")
    with Lease.join(storage) as lease:
        yield Shop(tmp_path / "storage", storage, lease)


@pytest.fixture
def shop(empty: Shop) -> Shop:
    """Four runs as in the first screen: retrying, failed, parked, completed."""
    start = ev.RunActivated(epoch=0)
    empty.run(
        "order-39",
        (720, start),
        (719, scheduled(1, "validate")),
        (718, completed_step(718, "1", {"total": 1999})),
        (717, ev.RunCompleted(result=payload({"total": 1999}))),
        finish=True,
    )
    empty.run(
        "order-40",
        (7200, start),
        (7199, ev.TimerStarted(position="1", due_at=time.time() + 162_000, delay_s=169_200)),
        (7198, ev.RunParked(due_at=time.time() + 162_000)),
    )
    empty.run(
        "order-41",
        (540, start),
        (539, scheduled(1, "charge", max_retries=3)),
        (538, failed_attempt(538, "1", 1, None, DECLINED)),
        (538, ev.StepFailed(position="1", dispatch=1, attempt=1, error=DECLINED, why="permanent")),
        (538, ev.RunFailed(error=DECLINED, position="1")),
        finish=True,
        attributes={"customer": "acme"},
    )
    empty.run(
        "order-42",
        (430, start),
        (429, scheduled(1, "validate")),
        (428, completed_step(428, "1")),
        (427, scheduled(2, "charge", max_retries=5, retry_delay_s=30, retry_backoff=2)),
        (400, failed_attempt(400, "2", 1, 30, BUSY)),
        (360, failed_attempt(360, "2", 2, 60, BUSY)),
        (280, failed_attempt(280, "2", 3, 120, BUSY)),
        (14, failed_attempt(14, "2", 4, 206, BUSY)),
    )
    return empty


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process: `result.stdout`, `result.stderr`, `result.exit_code`."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYWORKFLOW_STORAGE", "TERM"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, **extra: Any) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False, **extra)

    return run


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the command line as a user does, in a process of its own: bytes out, so that encodings are seen."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[bytes]:
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        return subprocess.run(
            [sys.executable, "-m", "pyworkflow_ray", *map(str, arguments)],
            cwd=cwd,
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            timeout=60,
            check=False,
        )

    return run
