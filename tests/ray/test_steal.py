"""`recover(steal=True)`: runs are taken from an owner that lives. It is refused, stops, and never takes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import flows
import psutil
import pytest
from processes import lives, until
from test_two_owners import Launch, answer, connected, launch

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import TERMINAL, RunActivated, RunParked, StepCompleted
from pyworkflow_ray.storage.storage import Storage

__all__ = ["connected", "launch"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

HELD = [f"held-{number}" for number in range(3)]


def ask(process: subprocess.Popen[str], what: str) -> object:
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return json.loads(answer(process))


def owner_with_runs(launch: Launch, storage: Path, folder: Path) -> subprocess.Popen[str]:
    owner = launch("stolen_script.py", storage, str(folder))
    assert answer(owner) == "started"
    ledger = folder / "ledger"
    until(lambda: sum(" 1 " in line for line in flows.lines(ledger)) == 2, "two runs are held in their second step")
    return owner


def lease_of(storage: Path, run_id: str) -> str:
    return Storage.open(storage).owner(run_id).lease


def check(run_id: str, result: int, steps: int) -> None:
    handle: pw.RunHandle[int] = pw.get_run(run_id)
    assert handle.result(90) == result
    events = handle.events()
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, TERMINAL) for event in events) == 1
    assert isinstance(events[-1], TERMINAL)
    done = Counter(event.position for event in events if isinstance(event, StepCompleted))
    assert sorted(done.values()) == [1] * steps


def test_who_is_stolen_from_stops_and_never_takes_back(launch: Launch, connected: Path, tmp_path: Path) -> None:
    owner = owner_with_runs(launch, connected, tmp_path)
    theirs = lease_of(connected, "held-0")
    assert pw.recover() == []  # it lives
    assert {handle.run_id for handle in pw.recover(steal=True)} == {*HELD, "sleeper"}
    assert all(lease_of(connected, run_id) != theirs for run_id in (*HELD, "sleeper"))
    (tmp_path / "gate").touch()
    for run_id in HELD:
        check(run_id, 6, 4)
    check("sleeper", 2, 2)
    until(lambda: ask(owner, "states") == {}, "the owner has given up all four")
    assert ask(owner, "recover") == []
    assert owner.poll() is None
    for run_id in (*HELD, "sleeper"):
        leases = [e.lease for e in pw.get_run(run_id).events() if isinstance(e, RunActivated)]
        assert leases[-1] != theirs
        assert sorted(leases, key=lambda lease: lease != theirs) == leases, f"{run_id} was taken back"
    assert pw.recover(steal=True) == []


def test_an_owner_that_was_stopped_meanwhile_is_refused_when_it_goes_on(
    launch: Launch, connected: Path, tmp_path: Path
) -> None:
    owner = owner_with_runs(launch, connected, tmp_path)
    assert any(isinstance(e, RunParked) for e in pw.get_run("sleeper").events())
    theirs = lease_of(connected, "held-0")
    stopped = [p for p in psutil.Process(owner.pid).children(recursive=True) if "ray::" in " ".join(p.cmdline())]
    assert stopped
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        assert len(pw.recover(steal=True)) == 4  # stopped, it holds its lease still
        (tmp_path / "gate").touch()
        for run_id in HELD:
            check(run_id, 6, 4)
        check("sleeper", 2, 2)
        before = {run_id: len(pw.get_run(run_id).events()) for run_id in (*HELD, "sleeper")}
    finally:
        for process in stopped:
            os.kill(process.pid, signal.SIGCONT)
    steps = len(flows.lines(tmp_path / "ledger"))
    assert lives(owner.pid)
    until(lambda: ask(owner, "states") == {}, "the owner has seen that it owns nothing")
    assert {run_id: len(pw.get_run(run_id).events()) for run_id in before} == before
    assert all(lease_of(connected, run_id) != theirs for run_id in before)
    assert len(flows.lines(tmp_path / "ledger")) == steps, "it has begun a step of a run that it does not own"
