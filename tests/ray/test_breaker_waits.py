"""A run that waits for its breaker on a real Ray: parked, without an attempt spent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
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


@pytest.mark.slow
def test_case_11_a_restart_of_the_whole_cluster_keeps_an_open_breaker_open(tmp_path: Path) -> None:
    """Two clusters, one after the other, with one storage: the second begins with what the first one knew."""
    script = Path(__file__).parent / "breaker_script.py"
    seen = []
    for failures in ("1", "0"):
        temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
        try:
            ran = subprocess.run(
                [sys.executable, str(script), str(tmp_path / "storage"), temp, failures],
                check=False,
                capture_output=True,
                text=True,
                timeout=240,
            )
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        assert ran.returncode == 0, ran.stderr
        seen.append(json.loads(ran.stdout.splitlines()[-1]))
    before, after = seen
    assert before[0] == after[0] == "open"
    assert before[1] == after[1] == "1 failure, the last: ConnectionError: 503 before the restart"
    assert 0 < after[2] < before[2] <= 600
    assert after[3] == before[3]
