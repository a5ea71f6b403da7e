"""Two processes and one storage: who owns a run, who takes it up, and who leaves it alone.

The owner is a script whose code lives in `__main__`; the takers know nothing of it but the storage. The oracle is the
ledger that its steps wrote.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import flows
import pytest
from processes import descendants, end_all, kill, lives, until

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import TERMINAL, RunActivated
from pyworkflow_ray.storage.storage import Storage

pytestmark = pytest.mark.ray

RESULT = [3, 0, 1, 2, 7]
BEFORE = ["decline 3", "step 0"]  # completed before the held step
AFTER = ["step 2", "decline 7"]

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start a script of this directory with (storage, a temp dir for its Ray, further arguments); all end with it."""
    started: list[subprocess.Popen[str]] = []
    temps: list[str] = []
    left: list[int] = []

    def start(script: str, storage: Path, *more: str) -> subprocess.Popen[str]:
        temps.append(tempfile.mkdtemp(prefix="pwr", dir="/tmp"))
        command = [sys.executable, str(Path(__file__).with_name(script)), str(storage), temps[-1], *more]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            left += descendants(root=process.pid)
            process.kill()
        process.wait()
    end_all(left)
    for temp in temps:
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def connected(runtime: Path, tmp_path: Path) -> Iterator[Path]:
    """This process connected to a storage of the test's own."""
    pw.shutdown()
    pw.init(storage=tmp_path / "other")
    yield tmp_path / "other"
    pw.shutdown()
    pw.init(storage=runtime, pool_min=2)


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("recover\n")
    process.stdin.flush()


def held_owner(launch: Launch, storage: Path, folder: Path, count: int) -> subprocess.Popen[str]:
    """A living owner of `count` runs, of which two, as many as its Ray has CPUs, are in their second step."""
    owner = launch("main_script.py", storage, str(folder / "ledger"), str(folder / "gate"), str(count))
    assert answer(owner) == "started"
    ledgers = [folder / f"ledger-{i}" for i in range(count)]
    until(lambda: sum("step 1" in flows.lines(ledger) for ledger in ledgers) == min(count, 2), "two runs are held")
    return owner


def is_free(storage: Path, run_id: str) -> bool:
    """Whether nobody holds the run's lease: a worker that was born during the kill still may."""
    lease = Storage.open(storage).owner(run_id).lease
    with (storage / "leases" / f"{lease}.lease").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def kill_with_its_ray(owner: subprocess.Popen[str], storage: Path) -> None:
    """SIGKILL of the owner; its embedded Ray, which would end by itself in a while, is ended with it."""
    below = descendants(root=owner.pid)
    kill(owner.pid)
    owner.wait()
    end_all(below)
    until(lambda: not any(lives(pid) for pid in below), "its Ray is gone")
    until(lambda: is_free(storage, "run-0"), "nobody holds its lease")


def check(run_id: str, ledger: Path, held: bool = True) -> None:
    handle: pw.RunHandle[list[int]] = pw.get_run(run_id)
    assert handle.result(60) == RESULT
    events = handle.events()
    assert [event.seq for event in events] == list(range(len(events)))
    assert sum(isinstance(event, TERMINAL) for event in events) == 1
    activations = [event.cause for event in events if isinstance(event, RunActivated)]
    assert activations.count("recovery") == 1
    # the step that was running is executed again, the completed ones are not, the later ones are executed once
    assert flows.lines(ledger) == [*BEFORE, *["step 1"] * (1 + held), *AFTER]


def test_runs_of_a_killed_script_go_on_in_a_process_that_has_not_its_code(
    launch: Launch, connected: Path, tmp_path: Path
) -> None:
    owner = held_owner(launch, connected, tmp_path, 1)
    assert pw.recover() == []  # it lives
    assert flows.lines(tmp_path / "ledger-0") == [*BEFORE, "step 1"]
    kill_with_its_ray(owner, connected)
    (tmp_path / "gate").touch()
    (handle,) = pw.recover()
    assert handle.run_id == "run-0"
    check("run-0", tmp_path / "ledger-0")
    assert pw.recover() == []


def test_recover_takes_nothing_from_an_owner_that_lives(launch: Launch, connected: Path, tmp_path: Path) -> None:
    held_owner(launch, connected, tmp_path, 2)
    assert pw.recover() == []
    (tmp_path / "gate").touch()
    for number in range(2):
        handle: pw.RunHandle[list[int]] = pw.get_run(f"run-{number}")
        assert handle.result(60) == RESULT
        assert [e.cause for e in handle.events() if isinstance(e, RunActivated)] == ["start"]
        assert flows.lines(tmp_path / f"ledger-{number}") == [*BEFORE, "step 1", *AFTER]


def test_of_two_that_recover_at_once_one_takes_each_run(launch: Launch, connected: Path, tmp_path: Path) -> None:
    owner = held_owner(launch, connected, tmp_path, 4)
    kill_with_its_ray(owner, connected)
    held = ["step 1" in flows.lines(tmp_path / f"ledger-{i}") for i in range(4)]
    taker = launch("taker.py", connected)
    assert answer(taker) == "ready"
    (tmp_path / "gate").touch()
    ask(taker)
    mine = {handle.run_id for handle in pw.recover()}
    theirs = set(json.loads(answer(taker)))
    assert mine | theirs == {f"run-{i}" for i in range(4)}
    for number in range(4):
        check(f"run-{number}", tmp_path / f"ledger-{number}", held[number])
    assert taker.stdin is not None
    taker.stdin.close()
    assert json.loads(answer(taker)) == [RESULT] * len(theirs)  # also of those that it lost to us
    assert taker.wait(30) == 0
