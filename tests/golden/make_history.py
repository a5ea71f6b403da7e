"""Records the golden history: `python -m tests.golden.make_history DIRECTORY`.

Run once a release that changes what is written; the directory is committed and never changed after it, for every later
version must read it. Run `order-1` has every event type, over four epochs; `order-2` ends in a torn tail after its
owner was overtaken; `order-3` has epochs in a fold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pyworkflow_ray.engine.events import (
    AnyEvent,
    CodeEnvironment,
    CodeRef,
    ErrorInfo,
    Event,
    Frame,
    Payload,
    RunCreated,
    TimerFired,
)
from pyworkflow_ray.storage.journal import Journal
from pyworkflow_ray.storage.storage import Storage

LEASE = "0123456789abcdef" * 2
AT = 1_790_000_000.25
CODE = CodeRef(how="import", name="shop:charge", module="shop", qualname="charge")
ERROR = ErrorInfo(
    kind="transient", type="ConnectionError", module="builtins", message="reset by peer — 接続",
    traceback="Traceback …", where=Frame(file="shop.py", line=7, function="charge"),
    exception=Payload(enc="pickle", data="gASV", size=4, cls="builtins:ConnectionError", py="3.11"),
)  # fmt: skip
RESULT = Payload(
    enc="json", data={"id": "ch_1", "amount": 12.5, "__type__": "no tag", "n": [None, True, 2**60]}, size=70
)
STEP: dict[str, Any] = {"position": "1", "dispatch": 1, "attempt": 1}

EPOCHS: list[list[dict[str, Any]]] = [
    [
        {"type": "run_activated", "epoch": 0, "lease": LEASE, "node": "n1", "worker": "w1"},
        {"type": "step_scheduled", "position": "1", "number": 1, "step": "shop:charge", "code": CODE, "args": [RESULT],
         "kwargs": {"key": RESULT}, "ray_options": {"num_cpus": 1}, "breaker": "payments",
         "policy": {"max_retries": 5, "retry_delay_s": 1.0, "retry_backoff": 2.0, "timeout_s": 10.0}},
        {"type": "step_dispatched", "position": "1", "dispatch": 1},
        {"type": "step_started", **STEP, "started_at": AT, "worker": "w2", "node": "n1"},
        {"type": "attempt_failed", **STEP, "started_at": AT, "ended_at": AT + 1, "error": ERROR, "delay_s": 2.0,
         "delay_reason": "backoff", "retry_at": AT + 3, "breaker": "closed", "worker": "w2", "node": "n1"},
        {"type": "step_handed_back", "position": "1", "dispatch": 1, "due_at": AT + 3},
        {"type": "run_parked", "due_at": AT + 3},
    ],
    [
        {"type": "run_activated", "epoch": 1, "cause": "wake", "lease": LEASE},
        {"type": "step_lost", "position": "1", "dispatch": 2, "attempt": 2, "cause": "worker_died", "message": "kill"},
        {"type": "step_completed", "position": "1", "dispatch": 3, "attempt": 3, "started_at": AT, "ended_at": AT + 1,
         "result": RESULT, "breaker": "closed", "worker": "w3", "node": "n1"},
        {"type": "timer_started", "position": "2", "due_at": AT + 60, "delay_s": 60.0},
        {"type": "timer_fired", "position": "2"},
        {"type": "timer_started", "position": "3", "due_at": AT + 60, "delay_s": 60.0},
        {"type": "timer_cancelled", "position": "3"},
        {"type": "step_scheduled", "position": "t1.1", "number": 2, "step": "ship", "code": CODE, "executor": "local"},
        {"type": "step_failed", "position": "t1.1", "dispatch": 1, "attempt": 1, "error": ERROR, "why": "permanent"},
        {"type": "step_scheduled", "position": "4", "number": 3, "step": "shop:mail", "code": CODE},
        {"type": "step_cancelled", "position": "4"},
        {"type": "run_failed", "error": ERROR, "position": "t1.1"},
    ],
    [
        {"type": "run_activated", "epoch": 2, "cause": "resume", "lease": LEASE, "resets": ["t1.1"]},
        {"type": "run_paused", "reason": "nondeterminism", "message": "paused at 2", "details": {"position": "2"}},
    ],
    [
        {"type": "run_activated", "epoch": 3, "cause": "recovery", "charged": True, "lease": LEASE},
        {"type": "run_cancel_requested", "reason": "a person said so"},
        {"type": "run_cancelled", "reason": "a person said so", "error": ERROR},
        {"type": "run_activated", "epoch": 3, "cause": "resume", "lease": LEASE},
        {"type": "run_completed", "result": RESULT},
    ],
]  # fmt: skip

_events: TypeAdapter[Event] = TypeAdapter(AnyEvent)


def _append(journal: Journal, items: list[dict[str, Any]]) -> None:
    first = journal.last_seq + 1
    events = [_events.validate_python({"seq": first + n, "at": AT + n, **item}) for n, item in enumerate(items)]
    journal.append(events).result()


def _create(storage: Storage, run_id: str) -> None:
    storage.create_run(
        RunCreated(
            seq=0, at=AT, run_id=run_id, run_uid=f"uid-of-{run_id}", storage_id=storage.storage_id, workflow="checkout",
            version="7", code=CODE, environment=CodeEnvironment(key="env", python="3.11", import_roots=("/srv/shop",)),
            args=[RESULT], attributes={"customer": "Zoë", "tags": ["a", 1]}, max_duration_s=3600.0, trace_id="ab" * 16,
        ),
        lease=LEASE,
    )  # fmt: skip


def record(directory: Path) -> None:
    """Write the storage to `directory`/storage and what it must be read as to `directory`/expected.json."""
    made = Storage.open(directory / "storage")
    storage = Storage(made.root, made.storage_id, fold_limit=2)
    _create(storage, "order-1")
    for number, items in enumerate(EPOCHS):
        journal, _ = Storage.activate(made, "order-1", LEASE, first=number == 0)
        _append(journal, items)
        journal.close()
    journal.finish()
    _create(storage, "order-2")
    stale, _ = storage.activate("order-2", LEASE, first=True)
    _append(stale, [TimerFired(position="1").model_dump(exclude={"seq", "at"})])
    storage.activate("order-2", LEASE)[0].close()
    path = next((directory / "storage" / "runs").glob("*/order-2/0.journal"))
    line = path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(path.read_bytes() + line)  # what a stale owner wrote beyond its seal
    journal, _ = storage.activate("order-2", LEASE)
    for position in "23":
        _append(journal, [TimerFired(position=position).model_dump(exclude={"seq", "at"})])
    journal.close()
    path = path.with_name(f"{journal.epoch}.journal")
    path.write_bytes(path.read_bytes()[:-9])  # what a crash leaves
    _create(storage, "order-3")
    for number in range(5):
        journal, _ = storage.activate("order-3", LEASE)
        _append(journal, [TimerFired(position=str(number)).model_dump(exclude={"seq", "at"})])
        journal.close()
    expected = {}
    for run_id in storage.list_run_ids():
        history = storage.read_run(run_id)
        expected[run_id] = {
            "epoch": history.epoch, "epochs": history.epochs, "lease": history.lease, "torn": history.torn,
            "finished": history.finished, "events": [event.model_dump(mode="json") for event in history.events],
        }  # fmt: skip
    text = json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True)
    (directory / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
