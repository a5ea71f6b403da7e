"""Step calls as the driver makes them, for the tests of execution; a real codec on a store in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.events import AttemptFailed, AttemptsFailed, CodeRef, Event, StepStarted
from pyworkflow_ray.execution.interrupt import Interrupt
from pyworkflow_ray.execution.worker import execute_call
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.testing.blobs import MemoryBlobs

CODEC = StorageCodec(MemoryBlobs())


def call_of(step: Any, *args: Any, **fields: Any) -> StepCall:
    definition = step.definition
    values: dict[str, Any] = {
        "run_id": "order-42",
        "run_uid": "uid",
        "storage_id": "storage",
        "generation": 0,
        "workflow": "checkout",
        "position": "3",
        "number": 3,
        "epoch": 2,
        "dispatch": 7,
        "step": definition.name,
        "code": CodeRef(how="import", name=definition.name),
        "args": [CODEC.encode(value) for value in args],
        "kwargs": {},
        "policy": definition.policy,
        "executor": definition.executor,
    }
    return StepCall(**{**values, **fields})


def each(records: Iterable[Event]) -> list[AttemptFailed]:
    """Failed attempts one by one, those recorded together taken apart."""
    found: list[AttemptFailed] = []
    for one in records:
        found += one.each() if isinstance(one, AttemptsFailed) else [one] if isinstance(one, AttemptFailed) else []
    return found


class Execution:
    """One executed call with what it reported."""

    def __init__(self) -> None:
        self.reported: list[StepStarted | AttemptFailed] = []
        self.interrupt = Interrupt()

    def run(self, step: Any, *args: Any, breaker: Any = None, kill_stuck: bool = False, **fields: Any) -> Outcome:
        known = {name: fields.pop(name) for name in ("wait_max_s", "clock", "confirmed", "starts") if name in fields}
        return execute_call(
            call_of(step, *args, **fields),
            step.definition,
            CODEC,
            report=self.reported.append,
            interrupt=self.interrupt,
            breaker=breaker,
            kill_stuck=kill_stuck,
            worker="worker-1",
            node="node-1",
            **known,
        )


def execute(step: Any, *args: Any, **fields: Any) -> Outcome:
    return Execution().run(step, *args, **fields)


def error_of(outcome: Outcome) -> BaseException:
    assert outcome.status == "failed", outcome
    assert outcome.error is not None
    return CODEC.decode_error(outcome.error)
