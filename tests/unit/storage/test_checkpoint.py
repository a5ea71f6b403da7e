"""Finished runs move to Parquet, are read back as they were, and one flipped bit anywhere is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.checked import decode_checked
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.sql import query
from pyworkflow_ray.storage.storage import Storage

DAY_S = 86_400.0


def checkpoint_files(storage: Storage, suffix: str) -> list[Path]:
    return sorted((Path(storage.root) / "checkpoints").rglob(f"*{suffix}"))


def journals(storage: Storage) -> list[Path]:
    return sorted((Path(storage.root) / "runs").rglob("*.journal"))


def test_compacted_runs_are_read_as_they_were(storage: Storage, make_run: Any) -> None:
    written = {name: make_run(name, at=1_790_000_000 + number * DAY_S) for number, name in enumerate(["a", "b", "c"])}
    before = {run_id: storage.read_run(run_id) for run_id in written}
    done = compact(storage)
    assert (done.runs, done.events, done.damaged) == (3, 24, [])
    assert journals(storage) == []
    for run_id, events in written.items():
        after = storage.read_run(run_id)
        assert (after.events, after.epochs) == (events, before[run_id].epochs)
        assert after.finished
        assert (after.epoch, after.torn) == (before[run_id].epoch, False)
    assert storage.list_run_ids(finished=True) == ["a", "b", "c"]
    assert len({path.parent.name for path in checkpoint_files(storage, ".parquet")}) == 3


def test_compacting_again_does_nothing_and_later_runs_are_added(storage: Storage, make_run: Any) -> None:
    make_run("a")
    compact(storage)
    files = checkpoint_files(storage, "")
    assert compact(storage).runs == 0
    assert checkpoint_files(storage, "") == files
    make_run("b")
    assert compact(storage).runs == 1
    assert sorted(CompactedRuns(storage).ids()) == ["a", "b"]


def test_only_runs_that_can_not_go_on_are_compacted(storage: Storage, make_run: Any) -> None:
    for end in ("completed", "failed", "cancelled", "running"):
        make_run(end, end=end)
    done = compact(storage)
    assert (done.runs, done.kept) == (2, 1)
    assert sorted(CompactedRuns(storage).ids()) == ["cancelled", "completed"]
    assert storage.unfinished() == ["running"]
    assert storage.activate("failed", "")[1][-1].type == "run_failed"


def test_id_of_a_compacted_run_stays_taken(storage: Storage, make_run: Any) -> None:
    make_run("a")
    compact(storage)
    created = storage.read_run("a").events[0]
    assert storage.create_runs([created]) == [False]  # type: ignore[list-item]
    with pytest.raises(RunNotFoundError):
        CompactedRuns(storage).read("b")


def test_damaged_journal_is_reported_and_does_not_stop_the_others(storage: Storage, make_run: Any) -> None:
    for name in ("a", "b"):
        make_run(name)
    path = next(path for path in journals(storage) if path.parent.name == "a")
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    done = compact(storage)
    assert done.runs == 1
    assert [run_id for run_id, _ in done.damaged] == ["a"]
    assert path.read_bytes() == data


def test_two_compactors_at_once_are_refused(storage: Storage, make_run: Any) -> None:
    make_run("a")
    compact(storage)
    fd = os.open(f"{storage.root}/checkpoints/lock", os.O_WRONLY | os.O_APPEND)
    try:
        assert storage.disk.try_lock(fd)
        with pytest.raises(StorageError, match="under way"):
            compact(storage)
    finally:
        os.close(fd)
    assert compact(storage).runs == 0


def test_every_flipped_bit_of_a_manifest_is_named(storage: Storage, make_run: Any) -> None:
    make_run("a")
    compact(storage)
    (path,) = checkpoint_files(storage, ".json")
    whole = path.read_bytes()
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptJournalError):
            decode_checked(f"checkpoints/manifests/{path.name}", bytes(data), str(path))
        if bit % 211 == 0:
            path.write_bytes(data)
            with pytest.raises(CorruptJournalError) as caught:
                CompactedRuns(storage)
            assert caught.value.path == str(path)


@pytest.mark.parametrize("table", ["runs", "events", "steps", "attempts"])
def test_flipped_bits_of_parquet_are_named(storage: Storage, make_run: Any, table: str) -> None:
    make_run("a")
    compact(storage)
    (path,) = [path for path in checkpoint_files(storage, ".parquet") if path.name.startswith(table)]
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, len(whole) // 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert [error.path for error in CompactedRuns(storage).check()] == [str(path)], f"bit {bit} is silent"
    with pytest.raises(CorruptJournalError) as caught:
        query(storage, f"select count(*) from {table}")
    assert caught.value.path == str(path)
    path.write_bytes(whole)
    assert CompactedRuns(storage).check() == []


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_missing_checkpoint_files_are_named(storage: Storage, make_run: Any, suffix: str) -> None:
    make_run("a")
    compact(storage)
    for path in checkpoint_files(storage, suffix):
        path.unlink()
    with pytest.raises(CorruptJournalError, match="checkpoints"):
        storage.read_run("a")
    with pytest.raises(CorruptJournalError, match="checkpoints"):
        query(storage, "select * from runs")


def test_cut_parquet_and_foreign_manifest_are_refused(storage: Storage, make_run: Any, tmp_path: Path) -> None:
    make_run("a")
    compact(storage)
    events = next(path for path in checkpoint_files(storage, ".parquet") if path.name.startswith("events"))
    whole = events.read_bytes()
    events.write_bytes(whole[:-1])
    with pytest.raises(CorruptJournalError, match="events-"):
        Storage.open(storage.root).read_run("a")
    events.write_bytes(whole)
    other = Storage.open(tmp_path / "other")
    shutil.copytree(f"{storage.root}/checkpoints", f"{other.root}/checkpoints")
    with pytest.raises(CorruptJournalError, match="belongs to storage"):
        CompactedRuns(other)
    (manifest,) = checkpoint_files(storage, ".json")
    manifest.rename(manifest.with_name("9.json"))
    with pytest.raises(CorruptJournalError, match=r"9\.json"):
        CompactedRuns(storage)
