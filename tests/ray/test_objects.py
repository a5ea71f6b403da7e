"""Runs in a bucket, on real Ray and a real S3 server: a run actor is killed, then all of a driver's Ray, and another
process takes the runs up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import flows
import pytest
from processes import descendants, end_all, kill, until

from benchmarks.object_server import BUCKET, environment, moto_server
from pyworkflow_ray.engine.events import TERMINAL, RunActivated, StepCompleted
from pyworkflow_ray.storage.port import StoragePort, open_storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

URL = f"s3://{BUCKET}/end-to-end"


def owner_of(storage: StoragePort, run_id: str) -> int:
    return int(next(e.worker for e in reversed(storage.read_run(run_id).events) if isinstance(e, RunActivated)))


def start(script: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(flows.__file__).with_name(script)), *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_runs_in_a_bucket_outlive_their_actor_and_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
    left: list[int] = []
    with moto_server() as port:
        for name, value in environment(f"http://127.0.0.1:{port}").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        driver = start("driver.py", URL, temp, str(ledger), str(gate), "2")
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "started\n"
            storage = open_storage(URL, create=False)
            until(lambda: len(flows.lines(Path(f"{ledger}-0"))) == 5, "a run is held")
            kill(owner_of(storage, "run-0"))
            until(lambda: len(flows.lines(Path(f"{ledger}-0"))) == 6, "the run goes on in another actor")
            left = descendants(root=driver.pid)
            kill(driver.pid)
        finally:
            driver.kill()
            driver.wait()
            end_all(left)
        assert storage.unfinished() == ["run-0", "run-1"]
        gate.touch()
        taker = start("taker.py", URL, temp)
        try:
            assert taker.stdin is not None
            assert taker.stdout is not None
            assert taker.stdout.readline() == "ready\n"
            taker.stdin.write("recover\n")
            taker.stdin.flush()
            assert json.loads(taker.stdout.readline()) == ["run-0", "run-1"]
            taker.stdin.close()
            assert json.loads(taker.stdout.readline()) == [45, 45]
            assert taker.wait(60) == 0
        finally:
            left = descendants(root=taker.pid) if taker.poll() is None else []
            taker.kill()
            taker.wait()
            end_all(left)
            shutil.rmtree(temp, ignore_errors=True)
        for run_id in ("run-0", "run-1"):
            events = storage.read_run(run_id).events
            assert [event.seq for event in events] == list(range(len(events)))
            assert sum(isinstance(event, TERMINAL) for event in events) == 1
            completed = [event.position for event in events if isinstance(event, StepCompleted)]
            assert len(completed) == len(set(completed)) == 10
        assert sum(isinstance(event, RunActivated) for event in storage.read_run("run-0").events) >= 3
        until(lambda: not storage.unfinished(), "finished runs have left the index")
