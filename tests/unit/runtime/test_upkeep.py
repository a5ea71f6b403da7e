"""When the controller compacts, and that it does so in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from pyworkflow_ray.runtime import upkeep
from pyworkflow_ray.runtime.messages import RuntimeConfig
from pyworkflow_ray.runtime.upkeep import ENDED_AT_ONCE, Schedule, Upkeep
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended

NEVER = float("inf")


def test_it_is_due_by_age_and_by_number() -> None:
    schedule = Schedule(60.0, retains=False, now=0.0)
    assert schedule.due_at() == 60.0  # for what an earlier controller left
    schedule.begun()
    schedule.done(True, left=False, now=61.0)
    assert schedule.due_at() == NEVER
    schedule.ended(100.0)
    schedule.ended(110.0)
    assert schedule.due_at() == 160.0
    for _ in range(ENDED_AT_ONCE):
        schedule.ended(120.0)
    assert schedule.due_at() == 61.0
    schedule.begun()
    schedule.ended(121.0)  # while it goes on
    schedule.done(True, left=True, now=130.0)
    assert schedule.due_at() == 181.0


def test_failures_are_tried_again_ever_more_slowly() -> None:
    schedule = Schedule(60.0, retains=True, now=0.0)
    assert Schedule(0.0, retains=True, now=0.0).due_at() == NEVER
    pauses = []
    now = 60.0
    for _ in range(12):
        schedule.begun()
        schedule.done(False, left=True, now=now)
        pauses.append(schedule.due_at() - now)
        now = schedule.due_at()
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (60.0, 3600.0)


def test_ended_runs_are_compacted_by_another_process(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "s")
    storage.create_run(created("run", storage.storage_id))
    journal, _ = storage.activate("run", "", first=True)
    journal.append([ended(1)]).result()
    journal.finish()
    pids: list[int] = []
    over = threading.Event()

    def start(command: list[str]) -> Any:
        process = upkeep._start(command)
        pids.append(process.pid)
        return process

    class Watched(Upkeep):
        def _run(self) -> tuple[bool, bool]:
            worked = super()._run()
            over.set()
            return worked

    Watched(RuntimeConfig(storage.root, storage.storage_id, compact_after_s=1e-3, compact_above_bytes=0), start)
    assert over.wait(60.0)
    assert storage.run_directories() == []
    assert storage.read_run("run").events[-1] == ended(1)
    assert pids
    assert compact(storage).runs == 0


def test_a_compaction_that_fails_is_told(tmp_path: Path, caplog: Any) -> None:
    storage = Storage.open(tmp_path / "s")
    config = RuntimeConfig(storage.root, storage.storage_id, compact_after_s=0.0)

    def start(_: list[str]) -> Any:
        code = "import sys; sys.exit('no room')"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    assert Upkeep(config, start)._run() == (False, True)
    assert "no room" in caplog.text
