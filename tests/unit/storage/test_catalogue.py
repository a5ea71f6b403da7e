"""The catalogue when things go wrong round it: replaced, restored, damaged, on a disk that can't be written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.storage import catalogue, stocktaking
from pyworkflow_ray.storage.catalogue import Catalogue, DamagedCatalogue, Query, canonical
from pyworkflow_ray.storage.catalogue_check import check, keep_right
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.listing import find, page, scan, stock
from pyworkflow_ray.storage.sql import rows
from pyworkflow_ray.storage.stocktaking import catalogue_path, rebuild, take_in
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.verify import verify
from tests.journals import FaultyDisk, created, ended

IDS = [f"run-{number}" for number in range(8)]


def add(storage: Storage, run_ids: list[str], *, finished: bool = True) -> None:
    storage.create_runs(
        [created(one, storage.storage_id, at=float(n), attributes={"n": n % 3}) for n, one in enumerate(run_ids)]
    )
    for run_id in run_ids:
        journal, _ = storage.activate(run_id, "", first=True)
        journal.append([ev.RunActivated(seq=1, at=2.0, epoch=0), *([ended(2)] if finished else [])]).result()
        journal.finish() if finished else journal.close()


def listed(storage: Storage, query: Query | None = None) -> list[str]:
    return [row.run_id for row in page(storage, query or Query()).rows]


def with_fault(storage: Storage, fault: Callable[[str, Any], None]) -> Storage:
    disk = FaultyDisk()
    disk.fault = fault
    return Storage(storage.root, storage.storage_id, disk)


def flip(path: Path) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[:50] + bytes([before[50] ^ 1]) + before[51:])
    return before


def test_restored_run_is_listed_again_at_once(storage: Storage) -> None:
    add(storage, IDS)
    path = Path(storage.directory("run-3"), "0.journal")
    before = flip(path)
    assert set(page(storage, Query()).damaged) == {"run-3"}
    path.write_bytes(before)
    found = page(storage, Query())
    assert (found.damaged, len(found.rows)) == ({}, 8)
    assert find(storage, "run-3").status == "completed"
    compact(storage)
    found = page(storage, Query())
    assert (found.damaged, len(found.rows)) == ({}, 8)
    assert stock(storage).damaged == {}


def test_run_counts_once_though_it_was_remembered_as_unfinished(storage: Storage) -> None:
    add(storage, ["a"], finished=False)
    assert listed(storage) == ["a"]
    journal, events = storage.activate("a", "")
    journal.append([ended(len(events))]).result()
    journal.finish()
    compact(storage)
    storage.index.add("a", 0)  # the removal of its entry was lost with the power
    assert listed(storage) == ["a"]  # now it stands as unfinished, once more
    assert rows(storage, "select run_id, status from runs")[1] == [("a", "completed")]
    assert listed(storage) == ["a"]


def test_catalogue_that_is_replaced_while_it_is_opened_is_opened_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(storage, IDS)
    assert take_in(storage)
    connect, replaced = catalogue._connect, []

    def replacing(database: str) -> sqlite3.Connection:
        connection = connect(database)
        if "mode=rw" in database and not replaced:  # the old file is open, its log is not
            replaced.append(True)
            rebuild(storage)
            storage.create_runs([created("new", storage.storage_id, at=99.0)])
        return connection

    monkeypatch.setattr(catalogue, "_connect", replacing)
    with pytest.raises(DamagedCatalogue, match="was replaced"):
        Catalogue.open(catalogue_path(storage), storage.storage_id)
    replaced.clear()
    assert listed(storage)[0] == "new"
    assert replaced


def test_catalogue_that_another_process_made_meanwhile_stays(storage: Storage) -> None:
    add(storage, IDS)
    assert take_in(storage)
    seen = catalogue.inode(catalogue_path(storage))
    rebuild(storage)
    now = catalogue.inode(catalogue_path(storage))
    stocktaking.discard(storage, seen)
    assert catalogue.inode(catalogue_path(storage)) == now != seen
    stocktaking.discard(storage, now)
    assert catalogue.inode(catalogue_path(storage)) is None


def test_log_of_the_old_catalogue_is_gone_for_good_before_the_new_one_comes(storage: Storage) -> None:
    calls: list[tuple[str, str]] = []

    def fault(call: str, at: Any) -> None:
        calls.append((call, os.path.basename(str(at))))

    add(storage, IDS)
    rebuild(with_fault(storage, fault))
    last_unlink = max(n for n, (call, name) in enumerate(calls) if call == "unlink" and name.endswith("-wal"))
    rename = next(n for n, (call, name) in enumerate(calls) if call == "rename" and ".sqlite" in name)
    assert ("sync_dir", "catalogue") in calls[last_unlink:rename]
    assert calls[rename + 1 :][0] == ("sync_dir", "catalogue")


def test_disk_that_is_full_keeps_no_half_made_catalogue(storage: Storage) -> None:
    def fault(call: str, at: Any) -> None:
        if call == "sync_file" and ".sqlite" in str(at):
            raise OSError(errno.ENOSPC, "full")

    add(storage, IDS)
    full = with_fault(storage, fault)
    assert listed(full) == IDS[::-1]
    assert os.listdir(f"{storage.root}/catalogue") == ["lock"]
    assert listed(storage) == IDS[::-1]


def test_storage_that_can_t_be_written_is_listed_by_reading(storage: Storage) -> None:
    def fault(call: str, at: Any) -> None:
        if call in ("touch", "mkdir", "unlink", "rename", "open_append"):
            raise OSError(errno.EROFS, "read-only")

    add(storage, IDS[:6])
    add(storage, ["live"], finished=False)
    read_only = with_fault(storage, fault)
    assert sorted(listed(read_only)) == sorted([*IDS[:6], "live"])
    assert rows(read_only, "select count(*) from runs")[1] == [(7,)]
    assert take_in(storage)
    compact(storage)
    assert sorted(listed(read_only)) == sorted([*IDS[:6], "live"])
    assert rows(read_only, "select count(*) from runs")[1] == [(7,)]


def test_flipped_bits_of_the_catalogue_change_no_answer_that_is_not_checked(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bit that SQLite or a row's check notices heals; what only `check` finds is counted, and has to be found."""
    add(storage, IDS)
    compact(storage)
    add(storage, ["x-1", "x-2"])
    add(storage, ["live"], finished=False)
    queries = [
        Query(),
        Query(statuses=frozenset({"completed"}), workflow="flow"),
        Query(attributes=(("n", frozenset({canonical(1)})),)),
        Query(since=3_000_000),
    ]
    expected = [listed(storage, query) for query in queries]
    assert expected == [[row.run_id for row in scan(storage, query)[0]] for query in queries]
    path = Path(catalogue_path(storage))
    whole, rng = path.read_bytes(), random.Random(1)
    used = [at for at, byte in enumerate(whole) if byte]
    for at in rng.sample(used, int(os.environ.get("CATALOGUE_FLIPS", "30"))):
        bit = rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        found = [listed(storage, query) for query in queries]
        if found != expected:
            assert check(storage), f"byte {at}, bit {bit}: {found}, and nothing notices"
        for name in os.listdir(path.parent):
            if name != "lock":
                os.unlink(path.parent / name)


def settle(storage: Storage) -> None:
    """Have the catalogue made, and brought up to date."""
    for _ in range(2):
        assert take_in(storage)


def hide(storage: Storage, run_id: str) -> None:
    """Lose a run's rows as a flipped bit may: nothing that is read tells."""
    connection = sqlite3.connect(catalogue_path(storage))
    for table in ("runs", "tags"):
        connection.execute(f"delete from {table} where run_id = ?", (run_id,))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("run_id", ["run-3", "x"])
def test_run_that_is_missing_from_the_catalogue_is_found_and_brought_back(storage: Storage, run_id: str) -> None:
    add(storage, IDS)
    compact(storage)
    add(storage, ["x", "y"])
    settle(storage)
    assert (verify(storage).damaged, check(storage)) == ([], [])
    hide(storage, run_id)
    assert run_id not in listed(storage)
    (damage,) = verify(storage).damaged
    assert damage.path == catalogue_path(storage)
    keep_right(storage)
    assert run_id in listed(storage)
    assert verify(storage).damaged == []
    hide(storage, run_id)
    keep_right(storage)  # once a day
    assert run_id not in listed(storage)


def test_ended_run_whose_directory_is_gone_is_told(storage: Storage) -> None:
    add(storage, IDS)
    settle(storage)
    where = storage.directory("run-2")
    shutil.rmtree(where)
    assert [(one.run_id, one.path) for one in verify(storage).damaged] == [("run-2", where)]


def test_verify_takes_runs_on_their_way_for_no_damage(storage: Storage) -> None:
    add(storage, IDS[:4])
    settle(storage)
    add(storage, IDS[4:])  # ended, not taken in
    add(storage, ["live"], finished=False)
    compact(storage)  # and moved
    add(storage, ["late"])
    assert verify(storage).damaged == []


def test_a_look_at_the_unfinished_runs_does_not_pass_all_that_ended() -> None:
    found = Catalogue.create(":memory:", "storage")
    part = found.add_part("runs.parquet")
    found.add(catalogue.Row(f"run-{n:05}", n, "flow", "completed", "{}", part) for n in range(5_000))
    found.put_live(
        [catalogue.LiveRow(catalogue.Row(run_id, 1, "flow", "running", "{}"), "") for run_id in ("run-00042", "live")]
    )
    found.seal()
    steps = []
    found.connection.set_progress_handler(lambda: steps.append(1), 100)  # called every 100 instructions of SQLite
    assert found.live_in_parts() == {"run-00042"}
    assert len(steps) < 10, "it looks at each ended run"
    found.close()


def test_run_that_was_compacted_since_it_was_met_leaves_the_index_too(storage: Storage) -> None:
    add(storage, ["done"])
    compact(storage)
    storage.index.add("done", 0)  # as a power loss brings it back
    storage.index.add("done", 1)  # and as somebody does who is about to resume it
    assert storage.unlist_finished("done")
    assert storage.index.entries("done", 5) == [1]
