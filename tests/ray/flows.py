"""Workflows of the tests, importable by every process. Steps write to a ledger outside the system, synced to disk."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path

import httpx

import pyworkflow_ray as pw


def note(ledger: str, line: str) -> None:
    """One line, durable."""
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)


def lines(ledger: Path) -> list[str]:
    return ledger.read_text().splitlines() if ledger.exists() else []


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


@pw.step
def add(x: int, y: int) -> int:
    return x + y


@pw.step
async def double(x: int) -> int:
    await asyncio.sleep(0)
    return x * 2


@pw.step(executor="local")
def minus(x: int, y: int) -> int:
    return x - y


@pw.step(executor="local")
async def local_async(x: int) -> tuple[int, int]:
    return x, os.getpid()


@pw.workflow
async def three(x: int) -> int:
    return await minus(await double(await add(x, 1)), 1)


@pw.workflow
async def locals_only(x: int) -> list[tuple[int, int]]:
    return list(await asyncio.gather(*(local_async(i) for i in range(x))))


@pw.step(num_cpus=0.1)
def numbered(ledger: str, i: int, gate: str = "") -> int:
    note(ledger, f"{i} {os.getpid()} {'-'.join(map(str, pw.current_step().fence))}")
    deadline = time.monotonic() + 60
    while gate and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.005)
    return i


@pw.workflow
async def ten(ledger: str, gate: str = "", gated: int = -1) -> int:
    """Ten steps; step `gated` waits until the file `gate` exists."""
    total = 0
    for i in range(10):
        total += await numbered(ledger, i, gate if i == gated else "")
    return total


@pw.step(max_retries=4, retry_delay=0, num_cpus=0.1)
def fails_twice(ledger: str) -> int:
    note(ledger, f"attempt {pw.current_step().attempt}")
    if pw.current_step().attempt <= 2:
        raise ConnectionError("not yet")
    return pw.current_step().attempt


@pw.step(max_retries=5)
def permanent(ledger: str) -> None:
    note(ledger, "permanent")
    raise ValueError("never")


@pw.workflow
async def retrying(ledger: str) -> tuple[int, str]:
    value = await fails_twice(ledger)
    try:
        await permanent(ledger)
    except ValueError as error:
        return value, str(error)
    return value, "?"


@pw.step
def raises_whole(which: str) -> None:
    if which == "httpx":
        request = httpx.Request("GET", "http://payments/charge")
        raise httpx.HTTPStatusError("503", request=request, response=httpx.Response(404, request=request))
    try:
        raise KeyError("inner")
    except KeyError as inner:
        raise KeywordOnly(code=7) from inner


@pw.workflow
async def catches(which: str) -> tuple[str, int]:
    try:
        await raises_whole(which)
    except httpx.HTTPStatusError as error:
        return "httpx", error.response.status_code
    except KeywordOnly as error:
        return ("keyword" if isinstance(error.__cause__, KeyError) else "cause lost"), error.code
    return "?", 0


@pw.workflow
async def lets_through() -> None:
    await raises_whole("keyword")


@pw.step(timeout=0.5)
def stuck_in_c() -> int:
    return sum(itertools.repeat(0))


@pw.step(timeout=0.3)
def swallows() -> str:
    while True:
        try:
            time.sleep(30)
        except Exception:
            pass


@pw.step(timeout=0.3)
async def sleeps_async() -> None:
    await asyncio.sleep(30)


@pw.workflow
async def timeouts(which: str) -> str:
    step = {"c": stuck_in_c, "sync": swallows, "async": sleeps_async}[which]
    try:
        await step()
    except pw.StepTimeoutError as error:
        return type(error).__name__
    return "?"


@pw.workflow
async def sleeper(seconds: float) -> int:
    first = await add(1, 1)
    await pw.sleep(seconds)
    return await add(first, 1)


@pw.step(num_cpus=0.1)
async def waits(ledger: str) -> None:
    note(ledger, "begun")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note(ledger, "cancelled")
        raise


@pw.step(num_cpus=0.1)
def cleans(ledger: str) -> None:
    note(ledger, "cleaned")


@pw.workflow
async def cancellable(ledger: str) -> None:
    try:
        await waits(ledger)
    finally:
        await cleans(ledger)


@pw.step(num_cpus=0.1, idempotent=False)
def once_only(ledger: str, gate: str) -> int:
    note(ledger, f"once {os.getpid()}")
    while not os.path.exists(gate):
        time.sleep(0.005)
    return 1


@pw.workflow
async def not_idempotent(ledger: str, gate: str) -> str:
    try:
        await once_only(ledger, gate)
    except pw.StepLostError:
        return "lost"
    return "done"


@pw.step(num_cpus=0.1)
def needs_flag(flag: str) -> str:
    if not os.path.exists(flag):
        raise ValueError("no flag")
    return "ok"


@pw.step(num_cpus=0.1, max_retries=1, retry_delay=600)
def retries_far(flag: str) -> str:
    if not os.path.exists(flag):
        raise ConnectionError("no flag")
    return "ok"


@pw.workflow
async def flagged(flag: str, far: bool) -> str:
    return await (retries_far if far else needs_flag)(flag)


dead_host = pw.CircuitBreaker("flows-dead-host", failure_threshold=1, recovery_timeout=4)


@pw.step(breaker=dead_host, on_open="wait")
def ask_host(n: int) -> tuple[int, int]:
    return n, pw.current_step().attempt


@pw.workflow
async def waits_for_its_host(n: int) -> tuple[int, int]:
    return await ask_host(n)
