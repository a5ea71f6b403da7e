"""A crash at every failpoint of compaction, merge, retention and of live prefixes: every event exactly once afterwards.

Each point is struck inside this process, by an exception that nothing catches, and some of them by a real death.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.failpoints import EXIT_CODE
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.sql import query
from pyworkflow_ray.storage.storage import Storage

DAY_S = 86_400.0
AT = 1_790_000_000.0
NOW = AT + 10 * DAY_S
RULES = Rules(retain_s={"completed": 9.5 * DAY_S}, failed_after_s=1.0, live_bytes=1)
COMPACT = "import sys; from pyworkflow_ray.storage.compact import Rules, Storage, compact; " + (
    f"compact(Storage.open(sys.argv[1], create=False), {RULES!r}, now={NOW!r})"
)


class Crash(BaseException):
    """What a failpoint raises here; no code of ours catches it."""


def write_run(storage: Storage, run_id: str, at: float = AT, end: str = "completed", epochs: int = 2) -> list[ev.Event]:
    code = ev.CodeRef(how="import", name="flow")
    environment = ev.CodeEnvironment(key="k", python="3.11")
    created = ev.RunCreated(
        seq=0,
        at=at,
        run_id=run_id,
        run_uid=f"uid-{run_id}-{at}",
        storage_id=storage.storage_id,
        workflow="m:flow",
        code=code,
        environment=environment,
    )
    storage.create_run(created)
    events: list[ev.Event] = [created]
    for number in range(epochs):
        journal, _ = storage.activate(run_id, "", first=number == 0)
        part: list[ev.Event] = [ev.RunActivated(seq=len(events), at=at, epoch=number, cause="recovery")]
        seq = len(events) + 1
        if number == epochs - 1 and end == "completed":
            part.append(ev.RunCompleted(seq=seq, at=at + 1, result=ev.Payload(enc="json", data=[1])))
        elif number == epochs - 1 and end == "failed":
            error = ev.ErrorInfo(kind="permanent", type="E", message="m")
            part.append(ev.RunFailed(seq=seq, at=at + 1, error=error))
        journal.append(part).result()
        events += part
        journal.finish() if number == epochs - 1 and end != "running" else journal.close()
    return events


def everything(storage: Storage) -> dict[str, list[ev.Event]]:
    """A storage in which one compaction does all that there is to do; what it holds before, but for what is forgotten.

    Three batches of a cold date are there already, runs to be retained no longer among them.
    """
    written = {}
    for number, name in enumerate(("old-1", "old-2", "old-3")):
        events = write_run(storage, name, at=AT + number % 2 * DAY_S)
        compact(storage, now=AT)
        if number % 2:
            written[name] = events
    written["fails"] = write_run(storage, "fails", at=AT + DAY_S, end="failed")
    written["young"] = write_run(storage, "young", at=AT + DAY_S, epochs=1)
    written["lives"] = write_run(storage, "lives", end="running", epochs=3)
    return written


def check_every_event_once(storage: Storage, written: dict[str, list[ev.Event]], gone: tuple[str, ...] = ()) -> None:
    """`gone` may be there whole, or not at all."""
    for run_id in gone:
        if run_id in storage.list_run_ids():
            written = {**written, run_id: storage.read_run(run_id).events}
            assert [event.seq for event in written[run_id]] == list(range(4))
    expected = sorted((run_id, event.seq) for run_id, events in written.items() for event in events)
    assert query(storage, "select run_id, seq from events order by all").fetchall() == expected
    ids = [(run_id,) for run_id in sorted(written)]
    assert query(storage, "select run_id from runs order by all").fetchall() == ids
    for run_id, events in written.items():
        assert storage.read_run(run_id).events == events
    assert storage.list_run_ids() == sorted(written)
    assert storage.unfinished() == [name for name in ("lives",) if name in written]


def check_nothing_left_over(storage: Storage) -> None:
    assert CompactedRuns(storage).orphans() == []
    assert sorted(storage.run_directories()) == ["lives"]
    directory = Path(storage.place("lives").directory)
    assert sorted(path.name for path in directory.iterdir()) == ["1.checkpoint", "2.journal"]
    assert len(list(Path(storage.root, "checkpoints").rglob("*.parquet"))) == 4 + 1
    assert len(list(Path(storage.root, "checkpoints", "manifests").iterdir())) == 1
    assert list(Path(storage.root, "tmp").iterdir()) == []


def strike(monkeypatch: pytest.MonkeyPatch, hits: Counter[str], at: tuple[str, int] = ("", 0)) -> None:
    """Count the failpoints of this process, and crash at one hit of one of them."""

    def failpoint(name: str) -> None:
        hits[name] += 1
        if (name, hits[name]) == at:
            raise Crash(name)

    for module in list(sys.modules.values()):
        if module is not None and module.__name__.startswith("pyworkflow_ray.storage") and hasattr(module, "failpoint"):
            monkeypatch.setattr(module, "failpoint", failpoint)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[ev.Event]]]:
    storage = Storage.open(tmp_path_factory.mktemp("template") / "storage")
    return storage.root, everything(storage)


def copy_of(root: str, tmp_path: Path, name: str) -> Storage:
    target = tmp_path / name
    subprocess.run(["cp", "-r", root, target], check=True)
    return Storage.open(target)


def test_crash_leaves_every_event_once(
    template: tuple[str, dict[str, list[ev.Event]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, written = template
    hits: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        strike(patch, hits)
        whole = copy_of(root, tmp_path, "whole")
        done = compact(whole, RULES, now=NOW)
    assert (done.runs, done.live, done.dropped) == (2, 1, 2)
    assert done.merged >= 2
    check_every_event_once(whole, written)
    check_nothing_left_over(whole)
    package = Path(sys.modules[Storage.__module__].__file__ or "").parent
    sources = [path.read_text() for path in package.glob("*.py")]
    named = {line.split('"')[1] for text in sources for line in text.splitlines() if 'failpoint("' in line}
    prefixes = ("checkpoint.", "manifest.", "compact.", "merge.", "retain.", "live.", "retire.")
    assert {name for name in named if name.startswith(prefixes)} - hits.keys() == {"compact.before_sweep"}
    points = [(name, hit + 1) for name in sorted(hits) for hit in range(hits[name])]
    assert len(points) > 80
    # All of them in `make test-all`; here the last hit of each.
    every = os.environ.get("HYPOTHESIS_PROFILE") == "search"
    chosen = points if every else [(name, hit) for name, hit in points if hit == hits[name]]
    for number, at in enumerate(chosen):
        storage = copy_of(root, tmp_path, str(number))
        with monkeypatch.context() as patch:
            strike(patch, Counter(), at)
            with pytest.raises(Crash):
                compact(storage, RULES, now=NOW)
        storage = Storage.open(storage.root)
        try:
            check_every_event_once(storage, written, gone=("old-1", "old-3"))
            compact(storage, RULES, now=NOW)
            check_every_event_once(storage, written)
            check_nothing_left_over(storage)
        except BaseException as error:
            error.add_note(f"crashed at {at}")
            raise


@pytest.mark.parametrize("at", ["checkpoint.before_link:5", "manifest.before_remove:1", "live.before_unlink:1"])
def test_death_of_the_process_leaves_every_event_once(
    template: tuple[str, dict[str, list[ev.Event]]], tmp_path: Path, at: str
) -> None:
    root, written = template
    storage = copy_of(root, tmp_path, "copy")
    environment = {**os.environ, "PYWORKFLOW_FAILPOINT": at, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", COMPACT, storage.root], env=environment, check=False).returncode
    assert died == EXIT_CODE, "the fault did not strike"
    check_every_event_once(storage, written, gone=("old-1", "old-3"))
    compact(storage, RULES, now=NOW)
    check_every_event_once(storage, written)
    for left in Path(storage.root, "tmp").iterdir():  # files that a real death leaves without a name
        left.unlink()
    check_nothing_left_over(storage)
