"""Workflows of test_batches.py, importable by every process. The ledger is outside the system, synced to disk."""

from __future__ import annotations

import os
import time
from typing import Any

from flows import lines, note

import pyworkflow_ray as pw

__all__ = ["lines"]


@pw.step(num_cpus=0.1, max_retries=1, retry_delay=0)
def work(n: int) -> int:
    if n % 1000 == 7:
        raise ValueError(f"no {n}")
    if n % 1000 == 8 and pw.current_step().attempt == 1:
        raise ConnectionError("not yet")
    return 2 * n


@pw.workflow
async def thousands(n: int) -> dict[str, Any]:
    batch = await work.map(range(n), concurrency=4, chunk_size=500)
    right = all(r == 2 * i for i, r in enumerate(batch.results) if i % 1000 != 7)
    return {"right": right, "failed": [i for i, _ in batch.failed], "retried": batch.retried, "words": str(batch)}


@pw.step(num_cpus=0.1)
def item(given: list[Any]) -> int:
    """Notes its process and key. Item 25 waits for its gate."""
    n, ledger, gate = given
    note(ledger, f"{n} {os.getpid()} {pw.current_step().idempotency_key}")
    deadline = time.monotonic() + 60
    while n == 25 and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.005)
    return int(n)


@pw.workflow
async def gated(ledger: str, gate: str) -> list[int]:
    batch = await item.map([[n, ledger, gate] for n in range(40)], concurrency=1, chunk_size=10)
    batch.raise_if_failed()
    return batch.results


@pw.step(num_cpus=0.1)
def needs_flag(given: list[Any]) -> int:
    n, ledger, flag = given
    note(ledger, f"{n}")
    if n % 10 == 3 and not os.path.exists(flag):
        raise ValueError(f"no flag for {n}")
    return int(n)


@pw.workflow
async def flagged(ledger: str, flag: str) -> list[int]:
    batch = await needs_flag.map([[n, ledger, flag] for n in range(30)], chunk_size=10)
    batch.raise_if_failed()
    return batch.results


@pw.step(num_cpus=0.1)
def undo(ledger: str, what: str, gate: str = "") -> None:
    note(ledger, f"undo {what} {os.getpid()}")
    deadline = time.monotonic() + 60
    while gate and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.005)


@pw.step(num_cpus=0.1)
def refuse() -> None:
    raise PermissionError("declined")


@pw.workflow
async def undone(ledger: str, gate: str) -> None:
    run = pw.current_run()
    run.on_failure(undo, ledger, "first")
    run.on_failure(undo, ledger, "second", gate)
    run.on_failure(undo, ledger, "third")
    await refuse()


@pw.step(num_cpus=0.1, timeout=0.3, max_recoveries=1)
def stuck_at_one(n: int) -> int:
    return sum(iter(int, 1)) if n == 1 else n


@pw.workflow
async def stuck() -> list[str]:
    batch = await stuck_at_one.map(range(3), chunk_size=3)
    return [type(r).__name__ for r in batch.results]


@pw.step(num_cpus=0.1, max_recoveries=50)
def noted(given: list[Any]) -> int:
    n, ledger = given
    note(ledger, f"{n} {os.getpid()} {pw.current_step().idempotency_key}")
    time.sleep(0.002)
    return int(n)


@pw.workflow(max_recoveries=100)
async def long_map(ledger: str, items: int) -> int:
    batch = await noted.map(([n, ledger] for n in range(items)), concurrency=4, chunk_size=25)
    batch.raise_if_failed()
    assert batch.results == list(range(items))
    return len(batch)
