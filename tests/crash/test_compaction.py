"""A crash at every failpoint of compaction: every event exactly once afterwards, and compacting again ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.failpoints import EXIT_CODE
from pyworkflow_ray.storage.checkpoint import CompactedRuns, compact
from pyworkflow_ray.storage.sql import query
from pyworkflow_ray.storage.storage import Storage

COMPACT = "import sys; from pyworkflow_ray.storage import checkpoint, storage; " + (
    "checkpoint.compact(storage.Storage.open(sys.argv[1], create=False))"
)
# Every failpoint of compaction, and how often it is reached by two runs of two epochs each on one day.
POINTS = {
    "compact.before_file": 4,
    "compact.before_sync_dir": 1,
    "compact.before_manifest": 1,
    "compact.before_link": 1,
    "compact.before_manifest_sync": 1,
    "compact.before_retire": 2,
    "retire.before_link": 2,
    "retire.before_unlink": 2,
    "retire.after_unlink": 4,
    "compact.after_retire": 1,
}


def write_run(storage: Storage, run_id: str, at: float = 1_790_000_000.0) -> list[ev.Event]:
    code = ev.CodeRef(how="import", name="flow")
    environment = ev.CodeEnvironment(key="k", python="3.11")
    created = ev.RunCreated(
        seq=0,
        at=at,
        run_id=run_id,
        run_uid=run_id,
        storage_id=storage.storage_id,
        workflow="m:flow",
        code=code,
        environment=environment,
    )
    storage.create_run(created)
    parts: list[list[ev.Event]] = [
        [ev.RunActivated(seq=1, at=at, epoch=0)],
        [
            ev.RunActivated(seq=2, at=at, epoch=1, cause="recovery"),
            ev.RunCompleted(seq=3, at=at + 1, result=ev.Payload(enc="json", data=[1])),
        ],
    ]
    for number, events in enumerate(parts):
        journal, _ = storage.activate(run_id, "", first=number == 0)
        journal.append(events).result()
        journal.finish() if number else journal.close()
    return [created, *parts[0], *parts[1]]


def run_compactor(storage: Storage, failpoint: str) -> int:
    environment = {**os.environ, "PYWORKFLOW_FAILPOINT": failpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", COMPACT, storage.root], env=environment, check=False).returncode


def check_every_event_once(storage: Storage, written: dict[str, list[ev.Event]]) -> None:
    expected = sorted((run_id, event.seq) for run_id, events in written.items() for event in events)
    assert query(storage, "select run_id, seq from events order by all").fetchall() == expected
    assert query(storage, "select run_id from runs order by all").fetchall() == [
        (run_id,) for run_id in sorted(written)
    ]
    for run_id, events in written.items():
        assert storage.read_run(run_id).events == events
    assert storage.list_run_ids(finished=True) == sorted(written)


@pytest.mark.parametrize(("name", "hit"), [(name, hit + 1) for name, hits in POINTS.items() for hit in range(hits)])
def test_crash_leaves_every_event_once(tmp_path: Path, name: str, hit: int) -> None:
    storage = Storage.open(tmp_path / "storage")
    written = {run_id: write_run(storage, run_id) for run_id in ("a", "b")}
    assert run_compactor(storage, f"{name}:{hit}") == EXIT_CODE, "the fault did not strike"
    check_every_event_once(storage, written)
    compact(storage)
    check_every_event_once(storage, written)
    assert sorted(CompactedRuns(storage).ids()) == ["a", "b"]
    assert CompactedRuns(storage).orphans() == []
    assert list(Path(storage.root, "runs").rglob("*.journal")) == []


def test_failpoints_are_all_enumerated(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "storage")
    for run_id in ("a", "b"):
        write_run(storage, run_id)
    armed = ",".join(f"{name}:{hits + 1}" for name, hits in POINTS.items())
    assert run_compactor(storage, armed) == 0  # none is reached more often than the tests above strike
    package = Path(sys.modules[Storage.__module__].__file__ or "").parent
    sources = [(package / name).read_text() for name in ("checkpoint.py", "storage.py")]
    named = {line.split('"')[1] for text in sources for line in text.splitlines() if 'failpoint("' in line}
    assert {name for name in named if name.startswith(("compact.", "retire."))} == set(POINTS)
