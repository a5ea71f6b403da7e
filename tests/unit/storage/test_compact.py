"""Compaction: which runs go, how files stay few, what happens to long live runs, and what is forgotten when."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.storage import compact_batches as compacting
from pyworkflow_ray.storage import compact_live
from pyworkflow_ray.storage import storage as storing
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.compact import Compaction, Rules, compact
from pyworkflow_ray.storage.journal import make_final
from pyworkflow_ray.storage.lease import orphans
from pyworkflow_ray.storage.sql import query
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.verify import verify
from tests.journals import FaultyDisk, created, ended, fired

DAY_S = 86_400.0
AT = 1_790_000_000.0
LIVE = Rules(live_bytes=1)


def parquet_files(storage: Storage) -> list[Path]:
    return sorted(Path(storage.root, "checkpoints").rglob("*.parquet"))


def names_of(storage: Storage, run_id: str) -> list[str]:
    return sorted(path.name for path in Path(storage.place(run_id).directory).iterdir())


def begin(storage: Storage, run_id: str = "long", epochs: int = 3, events: int = 2) -> list[ev.Event]:
    """A run that goes on, in so many epochs."""
    storage.create_run(created(run_id, storage.storage_id))
    for number in range(epochs):
        journal, history = storage.activate(run_id, "", first=number == 0)
        journal.append([fired(len(history) + n) for n in range(events)]).result()
        journal.close()
    return storage.read_run(run_id).events


# Which runs -------------------------------------------------------------------------------------------------------


def test_age_and_size_decide(storage: Storage, make_run: Any) -> None:
    make_run("old", at=AT)
    make_run("young", at=AT + 3600)
    done = compact(storage, Rules(older_than_s=1800), now=AT + 3610)
    assert (done.runs, done.kept, done.young) == (1, 1, 1)
    assert storage.run_directories() == ["young"]
    assert compact(storage, Rules(older_than_s=1800, above_bytes=10**6), now=AT + 3610).runs == 0
    assert compact(storage, Rules(older_than_s=1800, above_bytes=100), now=AT + 3610).runs == 1


def test_dry_run_writes_nothing_and_counts_the_same(storage: Storage, make_run: Any) -> None:
    make_run("a", at=AT)
    make_run("fails", at=AT, end="failed")
    begin(storage)
    before = sorted(Path(storage.root).rglob("*"))
    told = compact(storage, Rules(live_bytes=1, failed_after_s=5), now=AT + 3600, dry_run=True)
    assert sorted(Path(storage.root).rglob("*")) == before
    done = compact(storage, Rules(live_bytes=1, failed_after_s=5), now=AT + 3600)
    assert (told.runs, told.events, told.live) == (done.runs, done.events, done.live) == (2, 16, 1)


def test_a_dry_run_leaves_what_a_crash_left(storage: Storage, make_run: Any, tmp_path: Path) -> None:
    make_run("a", at=AT)
    directory, aside = Path(storage.place("a").directory), tmp_path / "aside"
    shutil.copytree(directory, aside)
    compact(storage, now=AT)
    shutil.copytree(aside, directory)  # as if it had died before it removed the journal
    assert compact(storage, now=AT, dry_run=True).runs == 0
    assert directory.exists()


def test_failed_runs_go_only_after_their_age_and_can_not_be_resumed_then(storage: Storage, make_run: Any) -> None:
    make_run("fails", at=AT, end="failed")
    assert compact(storage, Rules(), now=AT + DAY_S).kept == 1
    assert compact(storage, Rules(failed_after_s=2 * DAY_S), now=AT + DAY_S).kept == 1
    assert compact(storage, Rules(failed_after_s=DAY_S / 2), now=AT + DAY_S).runs == 1
    with pytest.raises(RunNotFoundError, match="was compacted"):
        storage.activate("fails", "")
    assert storage.read_run("fails").events[-1].type == "run_failed"


def test_a_resume_and_a_compaction_of_one_failed_run_exclude_each_other(storage: Storage, make_run: Any) -> None:
    make_run("fails", at=AT, end="failed")
    assert make_final(storage.place("fails")) is not None
    with pytest.raises(FencedError, match="taken for its checkpoint"):
        storage.activate("fails", "mine")
    assert compact(storage, Rules(failed_after_s=1)).runs == 1
    make_run("resumed", at=AT, end="failed")
    journal, events = storage.activate("resumed", "")
    journal.append([ev.RunActivated(seq=len(events), epoch=2, cause="resume")]).result()
    assert make_final(storage.place("resumed")) is None
    assert compact(storage, Rules(failed_after_s=1)).runs == 0
    journal.append([fired(len(events) + 1)]).result()  # its owner was not disturbed


def test_a_run_that_somebody_takes_over_is_left_alone(storage: Storage, make_run: Any) -> None:
    make_run("a", at=AT)
    place = storage.place("a")
    other = "7" * 32
    from pyworkflow_ray.storage.journal import _claim

    _claim(place, 2, other)  # it has not sealed yet
    assert compact(storage).runs == 0
    Path(storage.root, "leases").mkdir(exist_ok=True)
    from pyworkflow_ray.storage.checked import encode_checked

    content = {"lease": other, "storage_id": storage.storage_id}
    Path(storage.root, "leases", f"{other}.dead").write_bytes(encode_checked(f"leases/{other}.dead", content))
    assert compact(storage).runs == 1


# How many files ---------------------------------------------------------------------------------------------------


def test_the_number_of_files_is_bounded(storage: Storage, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "_CLASS_BYTES", 8_000)
    monkeypatch.setattr(compacting, "FULL_BYTES", 32_000)
    monkeypatch.setattr(compacting, "_CLASS_IDS", 4)
    written = {}
    for number in range(24):
        written[f"run-{number:02}"] = make_run(f"run-{number:02}", at=AT)
        compact(storage, now=AT + 60)
        manifest = storage.checkpoints.manifest()
        classes = [compacting.size_class(b.raw, 8_000) for b in manifest.batches if b.raw < 32_000]
        assert all(classes.count(c) < 4 for c in classes)
        lists = [compacting.size_class(ids.count, 4) for ids in manifest.ids]
        assert all(lists.count(c) < 4 for c in lists)
        assert len(parquet_files(storage)) == 4 * len(manifest.batches)
    assert any(batch.raw >= 32_000 for batch in storage.checkpoints.manifest().batches)
    assert storage.run_directories() == []
    for run_id, events in written.items():
        assert Storage.open(storage.root).read_run(run_id).events == events
    assert query(storage, "select count(*), count(distinct run_id) from events").fetchall() == [(24 * 8, 24)]
    # A date that is over is one batch, but for those that are full.
    compact(storage, now=AT + 5 * DAY_S)
    small = [batch for batch in storage.checkpoints.manifest().batches if batch.raw < 32_000]
    assert len(small) <= 1
    assert verify(storage).damaged == []


def test_a_reader_with_an_older_manifest_begins_again(storage: Storage, make_run: Any) -> None:
    events = make_run("a", at=AT)
    compact(storage, now=AT)
    reader = Storage.open(storage.root)
    assert reader.read_run("a").events == events
    old = CompactedRuns(reader)
    make_run("b", at=AT)
    compact(storage, now=AT + 9 * DAY_S)  # both in one batch now
    with pytest.raises(StorageError, match="was replaced meanwhile"):
        old.table(old.files[0])
    assert not old.current()
    assert reader.read_run("a").events == events
    assert reader.list_run_ids() == ["a", "b"]


def test_of_two_compactors_that_go_on_from_one_manifest_one_wins(
    storage: Storage, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", at=AT)
    compact(storage, now=AT)
    make_run("b", at=AT)
    write = compacting.write_ids
    others: list[Compaction] = []

    def slow(*args: Any) -> Any:
        if not others:
            others.append(Compaction())
            monkeypatch.setattr(storage.disk, "try_lock", lambda fd: True, raising=False)
            others.append(compact(Storage.open(storage.root), now=AT))  # as on a store without locks
        return write(*args)

    monkeypatch.setattr(compacting, "write_ids", slow)
    monkeypatch.setattr(type(storage.disk), "try_lock", lambda self, fd: True)
    with pytest.raises(StorageError, match="another compaction published"):
        compact(storage, now=AT)
    assert others[1].runs == 1
    monkeypatch.undo()
    assert compact(storage, now=AT).runs == 0
    assert query(storage, "select run_id, count(*) from events group by all order by 1").fetchall() == [
        ("a", 8),
        ("b", 8),
    ]
    assert CompactedRuns(storage).orphans() == []


# Ids --------------------------------------------------------------------------------------------------------------


def test_an_id_that_is_compacted_while_it_is_made_again_makes_no_second_run(
    storage: Storage, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = make_run("a", at=AT)
    late = Storage.open(storage.root)
    publish = Storage._publish

    def compacted_meanwhile(self: Storage, files: dict[str, bytes]) -> set[str]:
        compact(storage, now=AT)
        assert storage.run_directories() == []
        return publish(self, files)

    monkeypatch.setattr(Storage, "_publish", compacted_meanwhile)
    monkeypatch.setattr(type(late.disk), "exists", lambda self, path: not path.endswith("/a") and Path(path).exists())
    assert late.create_runs([created("a", storage.storage_id)]) == [False]
    monkeypatch.undo()
    assert storage.run_directories() == []
    assert storage.read_run("a").events == events
    assert storage.unfinished() == []


def test_a_run_made_beside_a_compacted_one_by_a_maker_that_died_never_runs(storage: Storage, make_run: Any) -> None:
    events = make_run("a", at=AT)
    compact(storage, now=AT)
    storage._publish({"a": storing.first_file(storage.storage_id, created("a", storage.storage_id), "")})
    assert storage.run_directories() == ["a"]
    assert storage.unfinished() == []
    assert orphans(storage).runs == []
    assert storage.read_run("a").events == events
    with pytest.raises(RunNotFoundError):
        storage.activate("a", "")
    assert compact(storage, now=AT).retired == 1
    assert storage.run_directories() == []


def test_retention_forgets_by_status_and_age_and_frees_the_id(storage: Storage, make_run: Any) -> None:
    for name, end, at in (("a", "completed", AT), ("b", "completed", AT + DAY_S), ("c", "cancelled", AT)):
        make_run(name, end=end, at=at)
    make_run("f", end="failed", at=AT)
    rules = Rules(retain_s={"completed": DAY_S, "failed": 30 * DAY_S})
    assert compact(storage, rules, now=AT + 1.5 * DAY_S).dropped == 1
    assert storage.list_run_ids() == ["b", "c", "f"]
    with pytest.raises(RunNotFoundError):
        storage.read_run("a")
    assert query(storage, "select run_id from runs order by 1").fetchall() == [("b",), ("c",), ("f",)]
    again = created("a", storage.storage_id, run_uid="another")
    storage.create_run(again)  # no old result: a new run, with a uid and so idempotency keys of its own
    assert storage.read_run("a").events == [again]
    assert storage.unfinished() == ["a"]
    assert compact(storage, rules, now=AT + 31 * DAY_S).dropped == 2
    assert storage.list_run_ids() == ["a", "c"]
    assert verify(storage).damaged == []


def test_wrong_retention_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="retain complete"):
        Rules(retain_s={"complete": 1})


# Long live runs ---------------------------------------------------------------------------------------------------


def test_closed_epochs_of_a_live_run_move_and_it_goes_on(storage: Storage) -> None:
    events = begin(storage, epochs=4)
    owner, _ = storage.activate("long", "")
    assert compact(storage, LIVE).live == 1
    assert names_of(storage, "long") == ["3.checkpoint", "4.journal"]
    assert len(parquet_files(storage)) == 1
    owner.append([fired(len(events))]).result()  # nothing has happened to its owner
    assert Storage.open(storage.root).read_run("long").events == [*events, fired(len(events))]
    resumed, history = storage.activate("long", "")
    assert history == [*events, fired(len(events))]
    with pytest.raises(FencedError):
        owner.append([fired(len(events) + 1)]).result()
    assert compact(storage, LIVE).live == 1
    assert names_of(storage, "long") == ["4.checkpoint", "5.journal"]
    resumed.append([ended(len(events) + 1)]).result()
    resumed.finish()
    whole = storage.read_run("long")
    assert compact(storage).runs == 1
    assert storage.run_directories() == []
    assert storage.read_run("long").events == whole.events
    assert storage.read_run("long").epochs == whole.epochs
    compact(storage)
    assert len(parquet_files(storage)) == 4  # the prefix has gone with its run
    assert verify(storage).damaged == []


def test_sql_and_folds_see_a_live_prefix_once(tmp_path: Path) -> None:
    opened = Storage.open(tmp_path / "s")
    storage = Storage(opened.root, opened.storage_id, fold_limit=2)
    events = begin(storage, epochs=9, events=1)
    assert compact(storage, LIVE).live == 1
    assert names_of(storage, "long") == ["7.checkpoint", "8.journal"]
    for _ in range(7):
        journal, history = storage.activate("long", "")
        assert history == events
        journal.append([fired(len(events))]).result()
        events = [*events, fired(len(events))]
        journal.close()
    assert storage.read_run("long").events == events
    assert query(storage, "select count(*) from events").fetchall() == [(len(events),)]
    assert compact(storage, LIVE).live == 1
    assert names_of(storage, "long") == ["14.checkpoint", "15.journal"]
    assert storage.read_run("long").events == events


def test_a_seal_that_a_newer_owner_may_overrule_closes_nothing(storage: Storage) -> None:
    begin(storage)
    from pyworkflow_ray.storage.journal import _claim

    _claim(storage.place("long"), 3, "")  # a newer owner, which has not read yet
    assert compact(storage, LIVE).live == 0


def test_what_a_checkpoint_holds_must_be_what_was_sealed(storage: Storage) -> None:
    """The seal above the checkpoint is held against it: here it names another prefix."""
    from pyworkflow_ray.storage.epochs import Base, assemble
    from pyworkflow_ray.storage.journal import read_view

    begin(storage)
    view = read_view(storage.place("long"))
    parts = tuple(view.accepted.sealed[epoch] for epoch in (0, 1))
    records = tuple(record for record in view.accepted.records if record[0] < 2)
    files = {2: view.files[2]}
    good = Base(1, parts, records)
    assert assemble(files, storage.storage_id, "long", good).records == view.accepted.records
    other = Base(1, (parts[0], parts[1].model_copy(update={"sha256": "0" * 64})), records)
    for base in (other, Base(1, parts, records[:-1]), Base(1, parts[:1], records), Base(0, parts[:1], records[:2])):
        with pytest.raises(CorruptJournalError):
            assemble(files, storage.storage_id, "long", base)


def test_flipped_bits_of_a_live_prefix_are_named(storage: Storage) -> None:
    begin(storage)
    compact(storage, LIVE)
    marker = Path(storage.place("long").directory, "1.checkpoint")
    for path in (marker, *parquet_files(storage)):
        whole = path.read_bytes()
        for bit in range(0, len(whole) * 8, len(whole) // 2):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CorruptJournalError):
                storage.read_run("long")
            assert [one.run_id for one in verify(storage).damaged] == ["long"]
        path.unlink()
        with pytest.raises(CorruptJournalError):
            storage.read_run("long")
        path.write_bytes(whole)
    assert verify(storage).damaged == []


# Verify -----------------------------------------------------------------------------------------------------------


def test_verify_names_every_sort_of_file(storage: Storage, make_run: Any) -> None:
    from pyworkflow_ray.storage.lease import Lease

    make_run("a", at=AT)
    compact(storage, now=AT)
    make_run("b", at=AT)
    digest = storage.put_blob(b"large")
    with Lease.join(storage):
        assert verify(storage).damaged == []
        root = Path(storage.root)
        paths = [
            root / "storage.json",
            next(root.glob("leases/*.lease")),
            root / "blobs" / digest[:2] / digest,
            next(root.glob("checkpoints/ids/*.ids")),
            next(root.glob("checkpoints/manifests/*.json")),
            *parquet_files(storage),
            *root.glob("runs/*/b/0.journal"),
        ]
        for path in paths:
            whole = path.read_bytes()
            path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
            (damage,) = verify(Storage(storage.root, storage.storage_id)).damaged
            assert str(path.parent) in damage.path
            path.write_bytes(whole)
    assert verify(storage).damaged == []


def test_verify_finds_an_unfinished_run_that_recovery_would_not(storage: Storage) -> None:
    begin(storage)
    for entry in Path(storage.root, "active").iterdir():
        entry.unlink()
    assert [one.run_id for one in verify(storage).damaged] == ["long"]


# Two parts that nothing else would miss -------------------------------------------------------------------------------


def test_epochs_do_not_move_where_the_disk_gives_back_less_than_was_read(tmp_path: Path) -> None:
    """After a failed write-back the page cache shows a seal that the disk does not hold."""
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    storage.create_run(created("run", storage.storage_id))
    for number in range(3):
        journal, _ = storage.activate("run", "", first=number == 0)
        journal.append([fired(journal.last_seq + 1)]).result()
        journal.close()
    place = storage.place("run")
    assert compact_live.closed_epochs(place, 1) is not None

    def lose_the_seal(call: str, what: Any) -> None:
        if call == "sync_old_epoch":
            head = Path(what).read_bytes().splitlines(keepends=True)[0]
            Path(what).write_bytes(head)

    disk.fault = lose_the_seal
    assert compact_live.closed_epochs(place, 1) is None


def test_no_directory_of_a_forgotten_run_comes_back_after_a_power_loss(tmp_path: Path) -> None:
    """The directories' removal is durable before the manifest that forgets their runs."""
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    storage.create_run(created("run", storage.storage_id))
    journal, _ = storage.activate("run", "", first=True)
    journal.append([ended(1)]).result()
    journal.finish()
    compact(storage)
    seen: list[tuple[str, str]] = []
    disk.fault = lambda call, what: seen.append((call, str(what)))
    assert compact(storage, Rules(retain_s={"completed": 0.0})).dropped == 1
    shard = os.path.dirname(storage.directory("run"))
    synced = [number for number, call in enumerate(seen) if call == ("sync_dir", shard)]
    assert synced
    assert all(number > max(synced) for number, (call, _) in enumerate(seen) if call == "link")
