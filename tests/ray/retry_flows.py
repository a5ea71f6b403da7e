"""Workflows of `test_retry`, importable by every process; kinds, hooks and budget are registered by the test alone."""

from __future__ import annotations

import asyncio
import time

from flows import lines, note

import pyworkflow_ray as pw


class Busy(ValueError):
    """Permanent by its base; the test registers it as transient."""


@pw.step(max_retries=3, retry_delay=0)
def busy(ledger: str) -> int:
    attempt = pw.current_step().attempt
    note(ledger, f"attempt {attempt}")
    if attempt < 3:
        raise Busy("busy")
    return attempt


@pw.workflow
async def asks(ledger: str) -> int:
    return await busy(ledger)


@pw.step(max_retries=1, retry_delay=0, on_exhausted="pause")
def needs(ledger: str, gate: str) -> int:
    import pathlib

    note(ledger, f"attempt {pw.current_step().attempt} after {len(pw.current_step().previous)}")
    if not pathlib.Path(gate).exists():
        raise ConnectionError("the service is not there")
    return pw.current_step().attempt


@pw.workflow
async def careful(ledger: str, gate: str) -> int:
    return await needs(ledger, gate)


@pw.step(max_retries=1, retry_delay=3600)
def later(ledger: str) -> int:
    note(ledger, f"attempt {pw.current_step().attempt}")
    if pw.current_step().attempt == 1:
        raise ConnectionError("refused")
    return pw.current_step().attempt


@pw.workflow
async def waits_long(ledger: str) -> int:
    return await later(ledger)


@pw.step
def slow(ledger: str, seconds: float) -> None:
    note(ledger, "begun")
    time.sleep(seconds)
    note(ledger, "ended")


@pw.workflow
async def two_slow(ledger: str, seconds: float) -> int:
    await slow(ledger, seconds)
    await slow(ledger, 0)
    return len(lines(__import__("pathlib").Path(ledger)))


@pw.step(max_retries=100, retry_delay=0, retry_budget="ray-tests")
def hopeless(ledger: str) -> None:
    note(ledger, "attempt")
    raise ConnectionError("refused")


@pw.workflow
async def many_hopeless(ledger: str, count: int) -> list[str]:
    found = await asyncio.gather(*(hopeless(ledger) for _ in range(count)), return_exceptions=True)
    return sorted({type(error).__name__ for error in found})


@pw.step(max_retries=None, retry_delay=[0.05, 0.05, 60], total_timeout=30)
def never() -> None:
    raise ConnectionError("refused")


@pw.workflow
async def bounded() -> None:
    await never()
