"""`pw.now random uuid4 sleep get_logger` outside workflows."""

from __future__ import annotations

import datetime as dt
import logging
import time

import pytest

import pyworkflow_ray as pw
from tests.unit.execution.calls import execute


def test_outside_a_run_they_are_the_plain_things() -> None:
    assert abs(pw.now().timestamp() - time.time()) < 60
    assert pw.now().utcoffset() == dt.timedelta(0)
    assert 0 <= pw.random() < 1
    assert pw.uuid4().version == 4
    with pytest.raises(pw.ConfigurationError, match="in none"):
        pw.current_run()


async def test_sleep_blocks_in_sync_code_and_awaits_in_async_code() -> None:
    @pw.step
    def sync() -> str:
        pw.sleep("1ms")  # type: ignore[unused-awaitable]
        return "slept"

    @pw.step
    async def in_loop() -> str:
        await pw.sleep(0.001)
        return "slept"

    assert sync() == "slept"
    assert await in_loop() == "slept"
    with pytest.raises(pw.ConfigurationError, match=r"sleep\('soon'\)"):
        pw.sleep("soon")  # type: ignore[unused-awaitable]


def test_the_logger_names_run_step_and_attempt(caplog: pytest.LogCaptureFixture) -> None:
    @pw.step(name="test-context-logs")
    def logs() -> None:
        pw.get_logger().warning("hello %s", "you", extra={"mine": 1})

    with caplog.at_level(logging.INFO, "pyworkflow_ray.user"):
        execute(logs)
        pw.get_logger().warning("outside")
    inside, outside = caplog.records
    assert inside.getMessage() == "hello you"
    shown = [getattr(inside, name) for name in ("run", "workflow", "step", "attempt", "mine")]
    assert shown == ["order-42", "checkout", "test-context-logs", 1, 1]
    assert outside.run is None  # type: ignore[attr-defined]
