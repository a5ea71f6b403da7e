"""A storage directory: made once, refused where it must be, one run an id, listings, blobs."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.errors import (
    ConfigurationError,
    CorruptJournalError,
    RunExistsError,
    RunNotFoundError,
    StorageError,
)
from pyworkflow_ray.storage.checked import encode_checked
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.mounts import network_file_system
from pyworkflow_ray.storage.storage import Storage
from tests.journals import FaultyDisk, created, ended, failing, fired, make_run


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "s")


def everything(root: str) -> set[str]:
    return {os.path.join(where, name) for where, _, files in os.walk(root) for name in files}


# Opening ----------------------------------------------------------------------------------------------------------


def test_a_storage_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    first = Storage.open(tmp_path / "deep" / "s")
    assert Storage.open(tmp_path / "deep" / "s").storage_id == first.storage_id
    assert stat.S_IMODE(os.stat(first.root).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{first.root}/storage.json").st_mode) == 0o600
    make_run(first)
    assert all(stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0 for path in everything(first.root))


def test_many_makers_of_one_storage_find_one_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: Storage.open(tmp_path / "s").storage_id, range(16)))
    assert len(ids) == 1


def test_a_missing_storage_is_not_made_where_that_is_not_wanted(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no storage at"):
        Storage.open(tmp_path / "s", create=False)
    assert not (tmp_path / "s").exists()


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigurationError, match=r"holds other files \('thesis.txt'\)"):
        Storage.open(tmp_path)
    with pytest.raises(ConfigurationError, match="is no directory"):
        Storage.open(tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_lost_storage_json_is_not_replaced_by_a_new_id(storage: Storage) -> None:
    make_run(storage)
    os.unlink(f"{storage.root}/storage.json")
    with pytest.raises(CorruptJournalError, match="is missing from a storage that holds runs"):
        Storage.open(storage.root)


def test_every_flipped_bit_of_storage_json_is_refused(storage: Storage) -> None:
    path = Path(storage.root, "storage.json")
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptJournalError, match=r"storage\.json is damaged"):
            Storage.open(storage.root)


def test_a_newer_format_is_refused_by_name(storage: Storage) -> None:
    path = Path(storage.root, "storage.json")
    path.write_bytes(encode_checked("storage.json", {"format": 7, "storage_id": storage.storage_id, "new": []}))
    with pytest.raises(StorageError, match="has format 7, this version reads 1: upgrade"):
        Storage.open(storage.root)


MOUNTS = r"""
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local ext4 rw 0 0
//nas/share /mnt/with\040space cifs rw 0 0
sshfs /mnt/ssh fuse.sshfs rw 0 0
/dev/sdb /mnt/ntfs fuseblk rw 0 0
overlay /layers fuse.fuse-overlayfs rw 0 0
old:/x /twice nfs rw 0 0
/dev/vdc /twice xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/s", None),
        ("/home/ann/s", "nfs4"),
        ("/home/local/s", None),
        ("/homework", None),
        ("/mnt/with space/s", "cifs"),
        ("/mnt/ssh", "fuse.sshfs"),
        ("/mnt/ntfs/s", None),
        ("/layers/s", None),
        ("/twice/s", None),
    ],
)
def test_network_file_systems_are_known_by_their_mount(path: str, kind: str | None) -> None:
    assert network_file_system(path, MOUNTS) == kind


@pytest.mark.parametrize("url", ["s3://bucket/runs", "gs://bucket", "file:///tmp/runs"])
def test_an_url_is_no_directory_and_no_directory_of_its_name_is_made(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"give it as text, such as 's3://bucket/prefix'"):
        Storage.open(url)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "pyworkflow_ray.storage.storage.network_file_system"
    monkeypatch.setattr(module, lambda path: network_file_system(path, f"x / ext4 rw 0 0\nn {tmp_path} nfs rw 0 0\n"))
    with pytest.raises(ConfigurationError, match=r"network file system \(nfs\), which is not available"):
        Storage.open(tmp_path / "s")
    assert os.listdir(tmp_path) == []


# Making runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run_id",
    ["", ".", "..", "../x", "a/b", "/etc/x", "a\0b", "\u202eabc", "x" * 10_000, "x" * 129, "'; drop table runs", "a b",
     "-rf", ".hidden", "a@1", "ü", "a\n", None, 3],
)  # fmt: skip
def test_hostile_ids_are_refused_before_anything_is_written(storage: Storage, run_id: Any) -> None:
    before = everything(storage.root)
    event = created("x", storage.storage_id).model_copy(update={"run_id": run_id})
    good = created("good", storage.storage_id)
    calls: list[Any] = [
        lambda: storage.create_runs([good, event]),
        lambda: storage.read_run(run_id),
        lambda: storage.owner(run_id),
        lambda: storage.activate(run_id, ""),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match="is no run id"):
            call()
    assert everything(storage.root) == before


@pytest.mark.parametrize("run_id", ["a", "A", "0", "x" * 128, "order-42", "a..b", "1.journal", "storage.json", "con"])
def test_odd_but_good_ids_work(storage: Storage, run_id: str) -> None:
    make_run(storage, run_id, events=1)
    assert (storage.list_run_ids(), len(storage.read_run(run_id).events)) == ([run_id], 2)


def test_an_id_is_taken_once_whatever_became_of_the_run(storage: Storage) -> None:
    make_run(storage)
    with pytest.raises(RunExistsError, match="'run' exists in"):
        storage.create_run(created("run", storage.storage_id, workflow="another"))
    journal, _ = storage.activate("run", "")
    journal.append([ended(1)]).result()
    journal.finish()
    with pytest.raises(RunExistsError):
        storage.create_run(created("run", storage.storage_id))
    assert storage.unfinished() == []
    compact(storage)
    assert storage.run_directories() == []
    with pytest.raises(RunExistsError):
        storage.create_run(created("run", storage.storage_id))
    assert storage.list_run_ids() == ["run"]
    with pytest.raises(RunNotFoundError, match="was compacted"):
        storage.activate("run", "")


def test_a_run_of_another_storage_is_refused(storage: Storage) -> None:
    with pytest.raises(ConfigurationError, match="storage id"):
        storage.create_run(created("run", "6" * 32))
    assert storage.list_run_ids() == []


def test_a_batch_makes_each_id_once(storage: Storage) -> None:
    make_run(storage, "b")
    events = [created(run_id, storage.storage_id) for run_id in ("a", "b", "a", "c")]
    assert storage.create_runs(events, lease="x") == [True, False, False, True]
    assert storage.unfinished() == ["a", "b", "c"]
    assert storage.owner("c").lease == "x"
    assert os.listdir(f"{storage.root}/tmp") == []


def test_a_batch_shares_the_syncs_of_directories(tmp_path: Path) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    disk.calls.clear()
    storage.create_runs([created(f"r{n}", storage.storage_id) for n in range(100)])
    assert disk.calls.count("sync_file") == 100
    assert disk.calls.count("sync_dir") <= 100 + 100 + 2  # one a run, one a shard that got a run, the index


@pytest.mark.parametrize("call", ["touch", "mkdir", "write_file", "sync_file", "sync_dir", "rename"])
def test_a_creation_that_fails_is_not_acknowledged_and_can_be_tried_again(tmp_path: Path, call: str) -> None:
    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    disk.fault = failing(call, errno.ENOSPC)
    with pytest.raises(StorageError, match=r"No space left.*Nothing was acknowledged"):
        storage.create_run(created("run", storage.storage_id))
    disk.fault = lambda *_: None
    storage.create_runs([created("run", storage.storage_id)])
    assert (storage.unfinished(), storage.list_run_ids()) == (["run"], ["run"])


def test_a_creation_that_dies_at_any_call_leaves_all_or_nothing(tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    disk = FaultyDisk()
    storage = Storage.open(tmp_path / "s", disk=disk)
    step = 0
    while True:
        left = [step]

        def fault(call: str, what: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Died

        disk.fault = fault
        run_id = f"r{step}"
        try:
            storage.create_run(created(run_id, storage.storage_id))
        except Died:
            disk.fault = lambda *_: None
            exists = run_id in storage.list_run_ids()
            # A run that exists is whole, and recovery finds it, acknowledged or not.
            assert (run_id in storage.unfinished()) == exists
            assert not exists or len(storage.read_run(run_id).events) == 1
            assert storage.create_runs([created(run_id, storage.storage_id)]) == [not exists]
            step += 1
        else:
            break
    assert step > 15


# Finding runs -----------------------------------------------------------------------------------------------------


def test_unknown_runs_are_not_found(storage: Storage) -> None:
    for call in (storage.read_run, storage.owner, storage.unlist_finished):
        with pytest.raises(RunNotFoundError, match="no run 'nope' in"):
            call("nope")
    with pytest.raises(RunNotFoundError):
        storage.activate("nope", "")


def test_a_resumed_run_is_unfinished_again_and_a_late_finish_does_not_hide_it(storage: Storage) -> None:
    make_run(storage)
    first, _ = storage.activate("run", "a")
    first.append([ended(1)]).result()
    resumed, _ = storage.activate("run", "b")
    assert resumed.append([RunActivated(seq=2, epoch=2, cause="resume", lease="b")]).result() == 2
    first.finish()  # the owner before was slow
    assert storage.unfinished() == ["run"]
    assert not storage.read_run("run").finished
    resumed.append([ended(3)]).result()
    resumed.finish()
    assert storage.unfinished() == []
    assert storage.list_run_ids(finished=True) == ["run"]


def test_a_run_that_ended_in_a_crash_leaves_the_index_when_it_is_found(storage: Storage) -> None:
    make_run(storage)
    journal, _ = storage.activate("run", "")
    journal.append([ended(1)]).result()
    journal.close()
    assert storage.unfinished() == ["run"]
    assert storage.unlist_finished("run")
    assert storage.unfinished() == []


def test_a_living_run_is_not_retired(storage: Storage) -> None:
    make_run(storage, events=1)
    assert not storage.unlist_finished("run")
    with pytest.raises(StorageError, match="no checkpoint holds"):
        storage.retire_run("run")
    assert len(storage.read_run("run").events) == 2


def test_a_creation_racing_a_finish_makes_no_second_run(tmp_path: Path) -> None:
    disk = FaultyDisk()
    late = Storage.open(tmp_path / "s", disk=disk)
    other = Storage.open(late.root)

    def meanwhile(call: str, what: Any) -> None:
        if call == "rename":  # the late one has seen that the id is free
            disk.fault = lambda *_: None
            make_run(other, events=1)
            journal, _ = other.activate("run", "")
            journal.append([ended(2)]).result()
            journal.finish()

    disk.fault = meanwhile
    with pytest.raises(RunExistsError):
        late.create_run(created("run", late.storage_id))
    assert late.unfinished() == []
    assert len(late.read_run("run").events) == 3


def test_a_copy_without_its_empty_directories_is_read_and_goes_on(storage: Storage) -> None:
    make_run(storage, events=1)
    for where, directories, files in os.walk(storage.root, topdown=False):
        if not directories and not files:
            os.rmdir(where)
    copy = Storage.open(storage.root)
    assert copy.list_run_ids() == ["run"]
    journal, _ = copy.activate("run", "")
    assert journal.append([fired(2)]).result() == 2
    make_run(copy, "more", events=1)


# Blobs ------------------------------------------------------------------------------------------------------------


def test_blobs_come_back_or_are_refused(storage: Storage) -> None:
    data = b"\0code" * 100
    digest = storage.put_blob(data)
    assert digest == hashlib.sha256(data).hexdigest() == storage.put_blob(data)
    other = Storage.open(storage.root)
    assert other.get_blob(digest) == data
    path = next(Path(storage.root, "blobs").glob(f"*/{digest}"))
    for bit in range(0, len(data) * 8, 41):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptJournalError, match=f"{digest} is damaged"):
            other.get_blob(digest)
    assert other.put_blob(data) == digest  # a new writer mends it
    assert other.get_blob(digest) == data


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "0" * 63, "G" * 64, "0" * 64])
def test_what_is_no_blob_is_a_clear_error(storage: Storage, digest: str) -> None:
    with pytest.raises(StorageError):
        storage.get_blob(digest)
