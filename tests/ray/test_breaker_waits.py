"""A run that waits for its breaker on a real Ray: parked, without an attempt spent."""

from __future__ import annotations

import time
from pathlib import Path

import flows
import pytest

import pyworkflow_ray as pw

pytestmark = pytest.mark.ray


def test_case_8_a_run_waits_parked_for_its_breaker_and_spends_no_attempt(runtime: Path) -> None:
    breaker = flows.dead_host
    with pytest.raises(ConnectionError), breaker:
        raise ConnectionError("503")
    handle = pw.start(flows.waits_for_its_host, 7)
    until = time.monotonic() + 30
    while handle.status() != "parked":
        assert time.monotonic() < until, handle.status()
        time.sleep(0.02)
    assert breaker.state == "open"
    assert handle.result(timeout=60) == (7, 1)
    kinds = [event.type for event in handle.events()]
    assert "attempt_failed" not in kinds
    assert kinds.count("step_handed_back") >= 1
