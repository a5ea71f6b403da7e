"""A run that waits for its breaker on a real Ray: parked, without an attempt spent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import flows
import pytest
import ray

import pyworkflow_ray as pw

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("how", ["reset", "force_closed", "configure"])
def test_case_8_a_run_waits_parked_for_its_breaker_until_a_person_changes_it(runtime: Path, how: str) -> None:
    """It would wait for an hour, spends no attempt, and comes at once."""
    breaker = flows.dead_host
    breaker.reset()
    breaker.configure(recovery_timeout=3600)
    with pytest.raises(ConnectionError), breaker:
        raise ConnectionError("503")
    handle = pw.start(flows.waits_for_its_host, 7)
    until = time.monotonic() + 60
    while handle.status() != "parked":
        assert time.monotonic() < until, handle.status()
        time.sleep(0.02)
    assert breaker.state == "open"
    if how == "configure":
        breaker.configure(recovery_timeout=0)
    else:
        getattr(breaker, how)()
    assert handle.result(timeout=120) == (7, 1)
    events = handle.events()
    kinds = [event.type for event in events]
    assert "attempt_failed" not in kinds
    due_at = [event.due_at for event in events if event.type == "step_handed_back"]
    assert due_at[0] > events[0].at + 3000


CELL = "import pyworkflow_ray as pw\nbreaker = pw.CircuitBreaker({name!r}, failure_threshold={threshold})"


def test_case_12_a_cell_that_is_run_again_wins_in_every_process(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This process is the notebook; a task of the cluster still has what the first run of the cell made."""
    name, namespace = f"test-{uuid.uuid4().hex}", {"__name__": "__main__"}

    def run_cell(threshold: int) -> Any:
        exec(compile(CELL.format(name=name, threshold=threshold), "<cell>", "exec"), namespace)
        return namespace["breaker"]

    class Elsewhere:
        def use(self, breaker: Any) -> int:
            with breaker:
                return int(breaker.snapshot().settings["failure_threshold"])

    older = run_cell(5)
    elsewhere = ray.remote(Elsewhere).options(num_cpus=0).remote()
    with older:
        pass
    assert ray.get(elsewhere.use.remote(older)) == 5
    newer = run_cell(2)
    assert "the newer code holds" in caplog.text
    assert newer.snapshot().settings["failure_threshold"] == 2
    assert ray.get(elsewhere.use.remote(older)) == 2
    assert ray.get(elsewhere.use.remote(newer)) == 2
    for _ in range(2):
        with pytest.raises(ConnectionError), older:
            raise ConnectionError
    assert newer.state == "open"
    ray.kill(elsewhere)


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
