"""Every kind of failure handling in one workflow, for `test_chaos`. What it did stands in a file, a line each."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from flows import note

import pyworkflow_ray as pw

KINDS = ("flaky", "guarded", "item", "reserve", "ship", "release")
service = pw.CircuitBreaker("chaos-service", failure_threshold=3, recovery_timeout=0.5)
budget = pw.RetryBudget("chaos", tokens=1_000_000)


def tell(ledger: str, kind: str, n: int) -> None:
    note(ledger, f"{kind} {n} {pw.current_step().idempotency_key} {os.getpid()}")


@pw.step(num_cpus=0.1, max_retries=3, retry_delay=0.05, retry_budget=budget, max_recoveries=100)
async def flaky(ledger: str, n: int) -> int:
    tell(ledger, "flaky", n)
    if pw.current_step().attempt < 3:
        raise ConnectionError("refused")
    return n


@pw.step(num_cpus=0.1, breaker=service, on_open="wait", max_retries=None, retry_delay=0.02, max_recoveries=100)
def guarded(ledger: str, down: str, n: int) -> int:
    tell(ledger, "guarded", n)
    if Path(down).exists():
        raise ConnectionError("down")
    return n


@pw.step(num_cpus=0.1, max_retries=2, retry_delay=0, max_recoveries=100)
def item(given: list[Any]) -> int:
    ledger, run, n = given
    tell(ledger, "item", run * 1_000 + n)
    if n == 7:
        raise ValueError("never")
    return int(n)


@pw.step(executor="local", max_recoveries=100)
def reserve(ledger: str, n: int) -> int:
    tell(ledger, "reserve", n)
    return n


@pw.step(num_cpus=0.1, max_recoveries=100)
def ship(ledger: str, n: int) -> int:
    tell(ledger, "ship", n)
    if n % 3 == 0:
        raise pw.FatalError("no such address")
    return n


@pw.step(num_cpus=0.1, max_recoveries=100)
def release(ledger: str, n: int) -> int:
    tell(ledger, "release", n)
    return n


@pw.workflow(max_recoveries=200)
async def mixed(ledger: str, down: str, n: int) -> str:
    await asyncio.gather(flaky(ledger, n), guarded(ledger, down, n))
    await asyncio.sleep(0.1)
    batch = await item.map(([ledger, n, i] for i in range(20)), chunk_size=5)
    assert [i for i, _ in batch.failed] == [7]
    await reserve(ledger, n)
    pw.current_run().on_failure(release, ledger, n)
    await ship(ledger, n)
    return f"done {n}"
