"""SIGKILL of everything that takes part in a run. Each kill is proven; the oracle is the ledger that the steps wrote.

What must hold: no acknowledged event is lost, no run ends twice, no completed step is executed again, and the result is
that of the run without a crash.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import deadly_flows
import flows
import pytest
from processes import controller_pid, descendants, end_all, kill, lives, until

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import TERMINAL, RunActivated, RunPaused, StepCompleted, StepLost
from pyworkflow_ray.storage.storage import Storage

pytestmark = pytest.mark.ray

EVENTS_OF_TEN = 2 + 10 * 2 + 1  # created, activated, ten times scheduled and completed, the end
SAMPLE = (1, 2, 3, 12, 20)  # make test; every event is in the slow test


@pytest.fixture
def pool(runtime: Path) -> Path:
    """Run actors warm, as they are a moment after any run."""
    assert pw.run(flows.three, 1) == 3
    return runtime


def owner_of(handle: pw.RunHandle[int]) -> int:
    return int(next(e.worker for e in reversed(handle.events()) if isinstance(e, RunActivated)))


def check_history(handle: pw.RunHandle[int], ledger: Path, executions_again: int) -> None:
    """The invariants, from the log and from the ledger."""
    events = handle.events()
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, TERMINAL) for event in events) == 1
    completed = [event.position for event in events if isinstance(event, StepCompleted)]
    assert len(completed) == len(set(completed)) == 10
    steps = [int(line.split()[0]) for line in flows.lines(ledger)]
    assert sorted(set(steps)) == list(range(10))
    assert steps == sorted(steps)  # a step that was completed is never executed again once the next has begun
    assert len(steps) <= 10 + executions_again


def kill_owner_at(number: int, tmp_path: Path) -> float:
    """SIGKILL the run actor once event `number` is durable; seconds until the next event."""
    ledger, gate = tmp_path / f"ledger-{number}", tmp_path / f"gate-{number}"
    step = min(9, max(0, (number - 2) // 2))
    handle = pw.start(flows.ten, str(ledger), str(gate), step)
    until(lambda: len(handle.events()) >= min(number + 1, 3 + 2 * step), f"event {number} is there")
    if number >= 2:
        until(lambda: len(flows.lines(ledger)) == step + 1, "the gated step runs")
    before = len(handle.events())
    pid = until(lambda: owner_of(handle) if len(handle.events()) > 1 else None, "it has an owner")
    kill(pid)
    at = time.monotonic()
    until(lambda: len(handle.events()) > before, "the run goes on")
    took = time.monotonic() - at
    gate.touch()
    assert handle.result(120) == 45
    activations = [e for e in handle.events() if isinstance(e, RunActivated)]
    assert [(e.cause, e.charged) for e in activations] == [("start", False), ("recovery", True)]
    assert pid != int(activations[-1].worker)
    check_history(handle, ledger, executions_again=1)
    return took


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("number", SAMPLE)
def test_a_run_survives_the_sigkill_of_its_actor(number: int, tmp_path: Path) -> None:
    kill_owner_at(number, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
def test_a_run_survives_the_sigkill_of_its_actor_at_each_event(tmp_path: Path) -> None:
    took = []
    for repeat in range(10):
        folder = tmp_path / str(repeat)
        folder.mkdir()
        took += [kill_owner_at(number, folder) for number in range(1, EVENTS_OF_TEN)]
    took.sort()
    print(f"{len(took)} kills; next event after p50 {took[len(took) // 2]:.3f} s, p99 {took[-len(took) // 100]:.3f} s")
    assert len(took) >= 200


@pytest.mark.usefixtures("pool")
def test_runs_go_on_and_start_while_the_controller_is_killed_under_load(tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    held = pw.start(flows.ten, str(ledger), str(gate), 4)
    until(lambda: len(flows.lines(ledger)) == 5, "the gated step runs")
    handles = pw.start_many(flows.three, [(i,) for i in range(20)])
    controller = controller_pid()
    kill(controller)
    handles += pw.start_many(flows.three, [(i,) for i in range(20, 40)])
    assert controller_pid() != controller
    gate.touch()
    assert held.result(120) == 45
    assert [handle.result(120) for handle in handles] == [2 * i + 1 for i in range(40)]
    # neither the run actor nor the step that ran noticed
    assert [e.cause for e in held.events() if isinstance(e, RunActivated)] == ["start"]
    assert len(flows.lines(ledger)) == 10
    for handle in handles:
        assert sum(isinstance(e, TERMINAL) for e in handle.events()) == 1


@pytest.mark.usefixtures("pool")
def test_a_parked_run_is_woken_by_the_restarted_controller() -> None:
    handle = pw.start(flows.sleeper, 4)
    until(lambda: handle.status() == "parked", "it is parked")
    kill(controller_pid())
    assert handle.result(120) == 3


@pytest.mark.usefixtures("pool")
def test_runs_of_a_killed_anchor_go_on_and_are_not_charged(tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(flows.ten, str(ledger), str(gate), 4)
    until(lambda: len(flows.lines(ledger)) == 5, "the gated step runs")
    owner = owner_of(handle)
    for anchor in descendants("ray::Anchor"):  # one for each code environment that runs were started with
        kill(anchor)
    until(lambda: not lives(owner), "its run actor dies with it")
    gate.touch()
    assert handle.result(120) == 45
    activations = [e for e in handle.events() if isinstance(e, RunActivated)]
    assert len(activations) >= 2
    assert not any(e.charged for e in activations)
    assert not any(e.charged for e in handle.events() if isinstance(e, StepLost))
    check_history(handle, ledger, executions_again=len(activations) - 1)


@pytest.mark.usefixtures("pool")
def test_a_workflow_whose_code_kills_its_process_before_it_begins_is_paused() -> None:
    handle = pw.start(deadly_flows.flow)
    until(lambda: handle.status() == "paused", "it is paused")
    activated, paused = handle.events()[1:]
    assert isinstance(activated, RunActivated)
    assert isinstance(paused, RunPaused)
    assert (paused.reason, activated.epoch) == ("max_recoveries", 2)
    assert "2 activations were lost" in paused.message
    assert pw.run(flows.three, 1) == 3


@pytest.mark.usefixtures("pool")
def test_recover_leaves_living_runs_alone(tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    handle = pw.start(flows.ten, str(ledger), str(gate), 2)
    until(lambda: len(flows.lines(ledger)) == 3, "the gated step runs")
    assert handle not in pw.recover()
    gate.touch()
    assert handle.result(60) == 45
    assert len(flows.lines(ledger)) == 10


@pytest.fixture
def temp() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_runs_of_a_killed_driver_are_taken_up_in_another_ray(runtime: Path, tmp_path: Path, temp: str) -> None:
    """The driver's embedded Ray dies with it: all of Ray is gone, and the storage alone is left."""
    storage, ledger, gate = tmp_path / "other", tmp_path / "ledger", tmp_path / "gate"
    command = [sys.executable, str(Path(flows.__file__).with_name("driver.py"))]
    driver = subprocess.Popen(
        [*command, str(storage), temp, str(ledger), str(gate), "3"], stdout=subprocess.PIPE, text=True
    )
    left: list[int] = []
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started\n"
        until(lambda: sum(len(flows.lines(tmp_path / f"ledger-{i}")) == 5 for i in range(3)) >= 2, "two runs are held")
        left = descendants(root=driver.pid)
        kill(driver.pid)
    finally:
        driver.kill()
        driver.wait()
        end_all(left)
    opened = Storage.open(storage)
    assert opened.unfinished() == ["run-0", "run-1", "run-2"]
    pw.shutdown()
    try:
        pw.init(storage=storage)
        (tmp_path / "gate").touch()
        handles = until(pw.recover, "the lease of the dead is free")
        assert {handle.run_id for handle in handles} == {"run-0", "run-1", "run-2"}
        for number in range(3):
            handle: pw.RunHandle[int] = pw.get_run(f"run-{number}")
            assert handle.result(120) == 45
            check_history(handle, tmp_path / f"ledger-{number}", executions_again=1)
            assert not any(e.charged for e in handle.events() if isinstance(e, RunActivated))
        assert pw.recover() == []
    finally:
        pw.shutdown()
        pw.init(storage=runtime, pool_min=2)
    assert os.path.exists(runtime)
