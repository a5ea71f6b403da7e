"""One run's journal on the real disk: damage at every byte and bit, owners one after another, disks that fail."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.errors import CorruptJournalError, FencedError, PayloadError, StorageError
from pyworkflow_ray.storage.epochs import assemble, decode_fold, encode_fold
from pyworkflow_ray.storage.journal import Journal
from pyworkflow_ray.storage.storage import Owner, Storage
from tests.journals import FaultyDisk, created, ended, failing, fired, make_run, names


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "s")


def run_directory(storage: Storage, run_id: str = "run") -> Path:
    return next(Path(storage.root, "runs").glob(f"*/{run_id}"))


def taken(storage: Storage, *counts: int) -> Journal:
    """The run after so many epochs with so many events each; the last epoch's journal, open."""
    journal: Journal | None = None
    for count in counts:
        if journal is not None:
            journal.close()
        journal, _ = storage.activate("run", "")
        for _ in range(count):
            journal.append([fired(journal.last_seq + 1)]).result()
    assert journal is not None
    return journal


# Damage -----------------------------------------------------------------------------------------------------------


def test_a_journal_cut_at_any_byte_gives_an_exact_prefix_or_is_refused(storage: Storage) -> None:
    make_run(storage, events=3)
    path = run_directory(storage) / "0.journal"
    data = path.read_bytes()
    whole = storage.read_run("run")
    ends = [n + 1 for n, byte in enumerate(data) if byte == 0x0A]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        if cut < ends[1]:  # head and run_created are there before the file has its name
            with pytest.raises(CorruptJournalError, match="runs"):
                storage.read_run("run")
            continue
        history = storage.read_run("run")
        kept = sum(end <= cut for end in ends) - 1
        assert history.events == whole.events[:kept]
        assert history.torn == (cut not in ends)


def test_a_later_epoch_cut_at_any_byte_gives_an_exact_prefix_or_is_refused(storage: Storage) -> None:
    make_run(storage, events=1)
    taken(storage, 2).close()
    path = run_directory(storage) / "1.journal"
    data = path.read_bytes()
    whole = storage.read_run("run")
    ends = [n + 1 for n, byte in enumerate(data) if byte == 0x0A]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        if cut < ends[0]:
            with pytest.raises(CorruptJournalError):
                storage.read_run("run")
            continue
        history = storage.read_run("run")
        assert history.events == whole.events[: 2 + sum(end <= cut for end in ends[2:])]
        assert (history.torn, history.settled) == (cut not in ends, cut >= ends[1])


def flips(data: bytes, step: int = 1) -> Iterator[bytes]:
    for bit in range(0, len(data) * 8, step):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_every_flipped_bit_of_every_file_of_a_run_is_refused(storage: Storage) -> None:
    make_run(storage, events=1)
    taken(storage, 1, 1).close()
    directory = run_directory(storage)
    files = {epoch: (directory / f"{epoch}.journal").read_bytes() for epoch in range(3)}
    assert len(assemble(files, storage.storage_id, "run").records) == 4
    for epoch, data in files.items():
        for flipped in flips(data):
            with pytest.raises(CorruptJournalError, match=f"epoch {epoch}"):
                assemble({**files, epoch: flipped}, storage.storage_id, "run")
        for flipped in flips(data, step=331):  # and through the whole way of a reader
            (directory / f"{epoch}.journal").write_bytes(flipped)
            with pytest.raises(CorruptJournalError, match=rf"runs/../run/{epoch}.journal: run 'run', epoch {epoch}"):
                storage.read_run("run")
        (directory / f"{epoch}.journal").write_bytes(data)
    assert len(storage.read_run("run").events) == 4


def test_every_flipped_bit_of_a_fold_is_refused() -> None:
    prefixes = {3: b"abc\n", 4: b"defgh\n"}
    data = encode_fold(prefixes, "s", "run")
    assert decode_fold(3, 4, data, "s", "run") == prefixes
    for flipped in flips(data):
        with pytest.raises(CorruptJournalError, match="fold 3-4"):
            decode_fold(3, 4, flipped, "s", "run")
    for first, last, storage_id, run_id in ((3, 5, "s", "run"), (3, 4, "t", "run"), (3, 4, "s", "nur")):
        with pytest.raises(CorruptJournalError):
            decode_fold(first, last, data, storage_id, run_id)


def test_files_that_were_swapped_dropped_or_brought_from_elsewhere_are_refused(
    storage: Storage, tmp_path: Path
) -> None:
    make_run(storage, events=1)
    taken(storage, 1, 1).close()
    make_run(storage, "other", events=1)
    elsewhere = Storage.open(tmp_path / "elsewhere")
    make_run(elsewhere, events=1)
    here = run_directory(storage)
    whole = {path.name: path.read_bytes() for path in here.iterdir()}
    foreign = [
        {"0.journal": run_directory(storage, "other").joinpath("0.journal").read_bytes()},
        {"0.journal": run_directory(elsewhere).joinpath("0.journal").read_bytes()},
        {"1.journal": whole["2.journal"]},
        {"1.journal": whole["2.journal"], "2.journal": whole["1.journal"]},
        {"2.journal": whole["1.journal"]},
        {"1.journal": b""},
        {"0.journal": b""},
        {"2.journal": b""},
        {"3.journal": b""},
        {"4.journal": whole["2.journal"]},
    ]
    for change in foreign:
        for name, data in {**whole, **change}.items():
            (here / name).write_bytes(data)
        with pytest.raises(CorruptJournalError):
            storage.read_run("run")
        shutil.rmtree(here)
        here.mkdir()
    for missing in ("0.journal", "1.journal"):
        for name, data in whole.items():
            (here / name).write_bytes(data)
        (here / missing).unlink()
        with pytest.raises(CorruptJournalError, match="has no file"):
            storage.read_run("run")


def test_an_older_state_of_a_sealed_file_is_refused(storage: Storage) -> None:
    make_run(storage, events=1)
    path = run_directory(storage) / "0.journal"
    stale = path.read_bytes()
    journal, _ = storage.activate("run", "")
    journal.append([fired(2)]).result()
    stale_one = (run_directory(storage) / "1.journal").read_bytes()
    journal.append([fired(3)]).result()
    journal.close()
    taken(storage, 1).close()
    (run_directory(storage) / "1.journal").write_bytes(stale_one)
    with pytest.raises(CorruptJournalError, match="epoch 1: its first"):
        storage.read_run("run")
    assert path.read_bytes() == stale


def test_a_damaged_run_gets_no_new_epoch_and_hides_no_other(storage: Storage) -> None:
    make_run(storage, events=1)
    make_run(storage, "other", events=1)
    path = run_directory(storage) / "0.journal"
    path.write_bytes(path.read_bytes()[:-5] + b"xxxx\n")
    with pytest.raises(CorruptJournalError):
        storage.activate("run", "")
    assert [entry.name for entry in path.parent.iterdir()] == ["0.journal"]
    assert storage.list_run_ids() == ["other", "run"]
    assert len(storage.read_run("other").events) == 2


def test_a_lost_end_of_a_run_that_had_ended_is_refused(storage: Storage) -> None:
    make_run(storage, events=1)
    journal, _ = storage.activate("run", "")
    journal.append([ended(2)]).result()
    journal.finish()
    path = run_directory(storage) / "1.journal"
    whole = path.read_bytes()
    for lost in (b"".join(whole.splitlines(keepends=True)[:-1]), whole[:-4]):
        path.write_bytes(lost)
        with pytest.raises(CorruptJournalError, match=r"run/1\.journal: the end of run 'run' is lost"):
            storage.read_run("run")
    path.write_bytes(whole)
    assert storage.read_run("run").finished


def test_a_lost_epoch_of_a_resumed_run_and_a_lost_entry_of_the_index_are_refused(storage: Storage) -> None:
    make_run(storage)
    journal, _ = storage.activate("run", "")
    journal.append([ended(1)]).result()
    journal.finish()
    resumed, _ = storage.activate("run", "")
    resumed.append([RunActivated(seq=2, at=2.0, epoch=2)]).result()
    resumed.close()
    entry, epoch = Path(storage.root, "active", "run@2"), run_directory(storage) / "2.journal"
    for path in (entry, epoch):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptJournalError, match="active/run@2"):
            storage.read_run("run")
        path.write_bytes(content)
    assert len(storage.read_run("run").events) == 3


def test_a_journal_whose_append_was_interrupted_takes_no_more(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage)
    journal = taken(storage, 0)

    def interrupt(call: str, what: Any) -> None:
        if call == "fdatasync":
            raise KeyboardInterrupt

    disk.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        journal.append([fired(1)])
    disk.fault = lambda *_: None
    with pytest.raises(StorageError, match="abandoned"):
        journal.append([fired(1)]).result()


# Owners -----------------------------------------------------------------------------------------------------------


def test_a_later_epoch_goes_on_where_the_one_before_was_sealed(storage: Storage) -> None:
    make_run(storage, events=2)
    journal, events = storage.activate("run", "lease-b")
    assert (journal.epoch, names(events)) == (1, ["run_created", "timer_fired:1", "timer_fired:2"])
    assert journal.append([fired(3), fired(4)]).result() == 4
    history = storage.read_run("run")
    assert (history.epoch, history.lease, history.epochs) == (1, "lease-b", [0, 0, 0, 1, 1])
    assert [event.seq for event in history.events] == [0, 1, 2, 3, 4]


def test_an_owner_that_was_overtaken_is_fenced_and_stays_so(storage: Storage) -> None:
    make_run(storage, lease="a")
    stale, _ = storage.activate("run", "a")
    taken(storage, 1).close()
    with pytest.raises(FencedError, match="another owner has begun a newer one"):
        stale.append([fired(1, "stale")]).result()
    assert stale.state == "fenced"
    with pytest.raises(FencedError):
        stale.append([fired(1, "stale")]).result()
    assert names(storage.read_run("run").events) == ["run_created", "timer_fired:1"]


def test_epoch_0_is_continued_once_and_by_its_lease_only(storage: Storage) -> None:
    storage.create_run(created("run", storage.storage_id), lease="a")
    with pytest.raises(FencedError, match="belongs to lease 'a', not 'b'"):
        storage.activate("run", "b", first=True)
    journal, events = storage.activate("run", "a", first=True)
    assert (journal.epoch, names(events)) == (0, ["run_created"])
    with pytest.raises(FencedError, match="being written"):
        storage.activate("run", "a", first=True)
    journal.append([fired(1)]).result()
    journal.close()
    with pytest.raises(FencedError, match="handed out before"):
        storage.activate("run", "a", first=True)


def test_a_taker_that_saw_an_older_epoch_is_refused(storage: Storage) -> None:
    make_run(storage)
    storage.activate("run", "b", after=0)[0].close()
    with pytest.raises(FencedError, match="newest epoch is 1, not 0"):
        storage.activate("run", "c", after=0)
    assert storage.owner("run").lease == "b"


def test_a_number_that_was_folded_away_is_not_free(tmp_path: Path) -> None:
    disk = FaultyDisk()
    late = Storage.open(tmp_path / "s", disk=disk)
    make_run(late, events=1)
    others = Storage(late.root, late.storage_id, fold_limit=1)

    def meanwhile(call: str, what: Any) -> None:
        if call == "link":
            disk.fault = lambda *_: None
            taken(others, 1, 1, 1).close()
            assert sorted(os.listdir(run_directory(late))) == ["0-1.journal", "2.journal", "3.journal"]

    disk.fault = meanwhile
    with pytest.raises(FencedError):
        late.activate("run", "late")  # links 1.journal, whose name is free again
    assert (run_directory(late) / "1.journal").exists()
    history = late.read_run("run")
    assert (history.epoch, len(history.events)) == (3, 5)
    assert storage_goes_on(late)


def storage_goes_on(storage: Storage) -> bool:
    journal, events = storage.activate("run", "")
    journal.append([fired(len(events))]).result()
    journal.close()
    return len(storage.read_run("run").events) == len(events) + 1


def test_many_epochs_leave_few_files_and_every_event(tmp_path: Path) -> None:
    opened = Storage.open(tmp_path / "s")
    storage = Storage(opened.root, opened.storage_id, fold_limit=4)
    make_run(storage)
    for number in range(40):
        taken(storage, number % 2).close()
        assert len(os.listdir(run_directory(storage))) <= 4 + 4 + 2
    history = storage.read_run("run")
    assert history.epoch == 40
    assert [event.seq for event in history.events] == list(range(21))
    fold = next(run_directory(storage).glob("0-*.journal"))
    data = fold.read_bytes()
    for flipped in flips(data, step=len(data)):
        fold.write_bytes(flipped)
        with pytest.raises(CorruptJournalError, match="fold"):
            storage.read_run("run")


def test_a_file_that_vanishes_into_a_fold_is_found_there(tmp_path: Path) -> None:
    disk = FaultyDisk()
    reader = Storage.open(tmp_path / "s", disk=disk)
    make_run(reader, events=1)
    others = Storage(reader.root, reader.storage_id, fold_limit=1)
    taken(others, 1).close()

    def meanwhile(call: str, what: Any) -> None:
        if call == "read":
            disk.fault = lambda *_: None
            taken(others, 1, 1).close()

    disk.fault = meanwhile
    assert len(reader.read_run("run").events) == 5


def test_a_fold_that_fails_leaves_a_run_that_works(tmp_path: Path) -> None:
    disk = FaultyDisk()
    opened = Storage.open(tmp_path / "s", disk=disk)
    storage = Storage(opened.root, opened.storage_id, disk, fold_limit=1)
    make_run(storage, events=1)
    taken(storage, 1).close()
    disk.fault = failing("write_file", errno.ENOSPC, skip=1)  # the first is the new epoch's
    journal, events = storage.activate("run", "")
    disk.fault = lambda *_: None
    assert len(events) == 3
    assert not list(run_directory(storage).glob("*-*.journal"))
    assert journal.append([fired(3)]).result() == 3


# Order, sizes, calls ----------------------------------------------------------------------------------------------


def test_events_out_of_order_are_refused_and_harm_nothing(storage: Storage) -> None:
    make_run(storage)
    journal = taken(storage, 1)
    with pytest.raises(ValueError, match="has seq 7, the next is 2"):
        journal.append([fired(7)]).result()
    with pytest.raises(ValueError, match="has seq 2, the next is 3"):
        journal.append([fired(2), fired(2)]).result()
    bad = created(attributes={"x": object()}).model_copy(update={"seq": 2})
    with pytest.raises(PayloadError):
        journal.append([bad]).result()
    assert journal.append([]).result() == 1
    assert journal.append([fired(2)]).result() == 2
    assert len(storage.read_run("run").events) == 3


def test_one_append_is_one_write_one_sync_and_one_listing(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage)
    journal = taken(storage, 0)
    disk.calls.clear()
    journal.append([fired(1), fired(2), fired(3)]).result()
    assert disk.calls == ["write", "fdatasync", "listdir"]


def test_the_loser_of_a_claim_gives_up(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage)

    def meanwhile(call: str, what: Any) -> None:
        if call == "link":
            disk.fault = lambda *_: None
            Storage.open(storage.root).activate("run", "winner")[0].close()

    disk.fault = meanwhile
    with pytest.raises(FencedError, match="another owner was faster"):
        storage.activate("run", "loser")
    assert storage.owner("run") == Owner(1, "winner")
    assert os.listdir(Path(storage.root, "tmp")) == []


# Disks that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("write", errno.ENOSPC, "No space left"),
        ("write", errno.EIO, "Input/output"),
        ("fdatasync", errno.EIO, "Input/out"),
    ],
)
def test_after_a_failed_write_or_sync_nothing_is_acknowledged_and_the_next_epoch_goes_on(
    tmp_path: Path, call: str, code: int, text: str
) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage)
    journal = taken(storage, 1)
    disk.fault = failing(call, code)
    with pytest.raises(StorageError, match=rf"1\.journal failed: {text}.*Nothing of this commit") as caught:
        journal.append([fired(2, "lost")]).result()
    assert caught.value.path.endswith("1.journal")
    disk.fault = lambda *_: None
    disk.calls.clear()
    assert journal.state == "abandoned"
    with pytest.raises(StorageError, match="abandoned"):
        journal.append([fired(2, "again")]).result()
    assert not {"write", "fdatasync"} & set(disk.calls)
    following, events = storage.activate("run", "")
    following.append([fired(len(events), "next")]).result()
    assert names(storage.read_run("run").events)[-1] == "timer_fired:next"


def test_pages_that_never_reached_the_disk_are_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed write-back the cache shows records that the disk does not hold; dropping the cache shows it."""
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage, events=1)
    stale, _ = storage.activate("run", "")
    stale.append([fired(2, "unsafe")]).result()
    stale.close()
    path_one = run_directory(storage) / "1.journal"
    kept = b"".join(path_one.read_bytes().splitlines(keepends=True)[:2])

    def lose(call: str, what: Any) -> None:
        if call == "sync_old_epoch":
            path_one.write_bytes(kept)

    disk.fault = lose
    journal, events = storage.activate("run", "")
    disk.fault = lambda *_: None
    assert names(events) == ["run_created", "timer_fired:1"]
    journal.append([fired(2, "safe")]).result()
    assert names(storage.read_run("run").events) == ["run_created", "timer_fired:1", "timer_fired:safe"]


def test_a_take_over_that_dies_at_any_call_leaves_a_run_that_can_be_taken(tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    def dying(after: int) -> Any:
        left = [after]

        def fault(call: str, what: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Died

        return fault

    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    make_run(storage, events=2)
    healthy = Storage.open(storage.root)
    calls = 0
    while True:
        disk.fault = dying(calls)
        try:
            storage.activate("run", "dies")[0].close()
        except Died:
            calls += 1
            assert len(healthy.read_run("run").events) == 2 + calls
            journal, events = healthy.activate("run", "next")
            journal.append([fired(len(events))]).result()
            journal.close()
        else:
            break
    assert calls > 10


def test_a_run_that_ended_leaves_the_unfinished(storage: Storage) -> None:
    make_run(storage)
    journal, _ = storage.activate("run", "")
    journal.append([ended(1)]).result()
    assert storage.unfinished() == ["run"]
    journal.finish()
    journal.finish()
    assert (storage.unfinished(), storage.list_run_ids(finished=True)) == ([], ["run"])
    assert storage.read_run("run").finished
