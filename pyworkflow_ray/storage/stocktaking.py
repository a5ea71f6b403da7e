"""Keeping the catalogue: runs that ended are taken in, checkpoints as well, and the whole made anew where it is lost.

Called by `listing`, the compactor and the controller's upkeep, in any process; calls `catalogue`, `checkpoint` and the
storage. Rules:

* One process at a time (`catalogue/lock`), so that nothing older is written over something newer. Readers need no lock.
* A run's entry in `ended` is removed after the commit that took the run in, and read before it: whatever happens to the
  run meanwhile leaves an entry of its own.
* Only a run's own files and the checkpoints decide what its row says. What can't be read is kept as damaged and tried
  again each time.
* A new catalogue is made beside the old one, synced, and moved into its place.

Faults: a crash at any point (an entry is taken in again; a half-made file is removed by the next), a full disk or a
read-only one (listings read instead), damaged runs (they hide no others).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic_core import to_json

from pyworkflow_ray.engine.events import Event, RunCreated
from pyworkflow_ray.engine.history import run_status
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.catalogue import FORMAT, Catalogue, DamagedCatalogue, LiveRow, Row, inode
from pyworkflow_ray.storage.directory import ensure_directory, listing

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint import CompactedRuns
    from pyworkflow_ray.storage.checkpoint_manifest import ParquetFile
    from pyworkflow_ray.storage.storage import Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")
X = TypeVar("X")

BATCH: Final = 1_000  # runs taken in by one commit

_DIRECTORY: Final = "catalogue"
_FILE: Final = f"runs-{FORMAT}.sqlite"
_WAIT_S: Final = 600.0  # for another process that makes the catalogue of millions of runs
_POLL_S: Final = 0.02
_TRIES: Final = 20
_COLUMNS: Final = ("run_id", "created_at", "workflow", "status", "attributes")


def catalogue_path(storage: Storage) -> str:
    return f"{storage.root}/{_DIRECTORY}/{_FILE}"


def take_in(storage: Storage, *, wait: bool = False) -> bool:
    """Bring the catalogue up to date, making it where it is missing or damaged.

    The controller's upkeep and the compactor call it, so that listings find little to do.

    Returns:
        False where another process is at it (and `wait` is false), or the storage can't be written.

    Raises:
        CorruptJournalError: a checkpoint is damaged. StorageError: it can't be read, or the other takes ten minutes.
    """
    try:
        with _locked(storage, wait) as held:
            if not held:
                return False
            return _again(lambda: _bring_up_to_date(storage))
    except (OSError, sqlite3.Error) as error:
        logger.info("the catalogue of %s can't be written: %s", storage.root, error)
        return False


def rebuild(storage: Storage) -> None:
    """Make the catalogue anew from journals and checkpoints, whatever it holds.

    Raises:
        StorageError: another process is at it for ten minutes, or the disk refuses.
    """
    try:
        with _locked(storage, wait=True):
            _again(lambda: _make_anew(storage))
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"making {catalogue_path(storage)} failed: {error}", path=catalogue_path(storage)) from error


def discard(storage: Storage, file: int | None) -> None:
    """Remove a catalogue that turned out to be damaged; the next listing makes another.

    file: its `inode`. Another process may have made another one meanwhile, which stays.
    """
    with contextlib.suppress(OSError), _locked(storage, wait=True):
        if inode(catalogue_path(storage)) == file:
            _remove_files(storage)


def in_memory(storage: Storage, unfinished: set[str], compacted: CompactedRuns | None) -> Catalogue:
    """A catalogue that nobody else sees, where none can be written. `unfinished` are left out; what else has not ended,
    because the index lost its entry, is added to them."""
    catalogue = Catalogue.create(":memory:", storage.storage_id)
    unfinished.update(_fill(storage, catalogue, unfinished, compacted))
    catalogue.seal()
    return catalogue


def keep_live(storage: Storage, rows: Sequence[LiveRow]) -> None:
    """Remember unfinished runs that were read, if nobody is at the catalogue just now."""
    if not rows:
        return
    try:
        with _locked(storage, wait=False) as held:
            catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id) if held else None
            if catalogue is None:
                return
            # A run that has left the index meanwhile must not be remembered: its id may come to be another run's.
            active = storage.index.run_ids()
            with contextlib.closing(catalogue), catalogue.changing():
                catalogue.keep_live(active)
                catalogue.put_live(row for row in rows if row.run.run_id in active)
    except (OSError, sqlite3.Error, DamagedCatalogue) as error:
        logger.info("the catalogue of %s can't be written: %s", storage.root, error)


def known_blocks(storage: Storage, files: Sequence[ParquetFile]) -> dict[str, bytes]:
    """The block sums that the catalogue has of these files, by path."""
    try:
        catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id)
        if catalogue is None:
            return {}
        with contextlib.closing(catalogue):
            found = {file.path: catalogue.block_sums(file.path, file.sha256) for file in files}
            return {path: sums for path, sums in found.items() if sums is not None}
    except (sqlite3.Error, DamagedCatalogue):
        return {}


def keep_blocks(storage: Storage, sums: Sequence[tuple[ParquetFile, bytes]]) -> None:
    """Remember block sums, if nobody is at the catalogue just now."""
    try:
        with _locked(storage, wait=False) as held:
            catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id) if held else None
            if catalogue is None:
                return
            with contextlib.closing(catalogue), catalogue.changing():
                for file, numbers in sums:
                    catalogue.put_blocks(file.path, file.sha256, numbers)
    except (OSError, sqlite3.Error, DamagedCatalogue) as error:
        logger.info("the catalogue of %s can't be written: %s", storage.root, error)


# What the truth is ------------------------------------------------------------------------------------------------


def row_of(run_id: str, events: Sequence[Event]) -> Row:
    """A run's row, of its whole history."""
    created = events[0] if events else None
    if not isinstance(created, RunCreated):
        raise CorruptJournalError(f"run {run_id!r}: its events do not begin with run_created")
    attributes = to_json(created.attributes).decode()
    return Row(run_id, round(created.at * 1_000_000), created.workflow, run_status(events), attributes)


def checkpoints(storage: Storage) -> CompactedRuns | None:
    """The storage's checkpoints as they stand; None where it has none, which costs no import of pyarrow."""
    if not storage.checkpoints.manifest().batches:
        return None
    from pyworkflow_ray.storage.checkpoint import CompactedRuns

    return CompactedRuns(storage)


def run_files(compacted: CompactedRuns | None) -> dict[str, ParquetFile]:
    """The files of compacted runs, by path."""
    return {} if compacted is None else {file.path: file for file in compacted.files if file.table == "runs"}


def rows_of(compacted: CompactedRuns) -> Iterator[Row]:
    """The rows of all compacted runs."""
    for number, file in enumerate(run_files(compacted).values()):
        yield from _rows_of(compacted, file, number)


def _rows_of(compacted: CompactedRuns, file: ParquetFile, part: int) -> Iterator[Row]:
    import pyarrow as pa

    table = compacted.table(file, columns=list(_COLUMNS))
    columns = [table[name] for name in _COLUMNS]
    columns[1] = columns[1].cast(pa.int64())
    texts = [column.cast(pa.string()) if pa.types.is_string(column.type) else column for column in columns]
    for run_id, created, workflow, status, attributes in zip(*(c.to_pylist() for c in texts), strict=True):
        yield Row(run_id, created, workflow, status, attributes, part)


def _again(work: Callable[[], T]) -> T:
    """What `work` gives; once more where a compaction replaced files under its hands."""
    for left in range(_TRIES, 0, -1):
        try:
            return work()
        except StorageError as error:
            if left == 1 or type(error).__name__ != "CheckpointChanged":  # whose module loads pyarrow
                raise
    raise AssertionError("not reached")


# Taking in --------------------------------------------------------------------------------------------------------


def _bring_up_to_date(storage: Storage) -> bool:
    _remove_new(storage)  # left of a crash
    try:
        catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id)
        if catalogue is not None:
            with contextlib.closing(catalogue):
                _take_in(storage, catalogue)
            return True
    except DamagedCatalogue as error:
        logger.warning("the catalogue of %s is made anew: %s", storage.root, error)
    _make_anew(storage)
    return True


def _take_in(storage: Storage, catalogue: Catalogue) -> None:
    again = sorted({*_take_in_checkpoints(storage, catalogue), *catalogue.damaged()})
    for run_ids in _batches(again):
        with catalogue.changing():
            for run_id in run_ids:
                _look_at(storage, catalogue, run_id)
    for entries in _batches(storage.index.ended()):
        with catalogue.changing():
            done = [entry for entry in entries if _look_at(storage, catalogue, entry[0])]
            failpoint("catalogue.before_commit")
        failpoint("catalogue.before_forget")
        for run_id, epoch in done:
            storage.index.forget_ended(run_id, epoch)


def _take_in_checkpoints(storage: Storage, catalogue: Catalogue) -> list[str]:
    """Have the catalogue hold what the checkpoints hold; the ids of runs that are in none of them any more."""
    compacted = checkpoints(storage)
    files, known = run_files(compacted), catalogue.parts()
    if files.keys() == known.keys():
        return []
    gone = []
    with catalogue.changing():
        for path in sorted(files.keys() - known.keys()):
            assert compacted is not None
            catalogue.put(_rows_of(compacted, files[path], catalogue.add_part(path)))
        for path in sorted(known.keys() - files.keys()):
            gone += catalogue.remove_part(known[path])
        catalogue.forget(gone)
        catalogue.keep_blocks(file.path for file in (compacted.files if compacted is not None else []))
        failpoint("catalogue.before_commit")
    return gone


def _look_at(storage: Storage, catalogue: Catalogue, run_id: str) -> bool:
    """Have the catalogue hold the run as it is now; False where its entry in `ended` has to stay."""
    row = catalogue.run(run_id)
    if row is not None and row.part is not None:
        catalogue.forget_damaged(run_id)
        return True  # a checkpoint holds it, so nothing can happen to it any more
    catalogue.forget([run_id])
    try:
        history = storage.read_run(run_id)
        row = row_of(run_id, history.events)
    except RunNotFoundError:
        return True
    except StorageError as error:
        catalogue.put_damaged(run_id, str(error))
        return True
    if history.finished:
        catalogue.put([row])
        return True
    return run_id in storage.index.run_ids()  # resumed; else its entry there was lost: listings go on reading it


def _batches(items: Sequence[X]) -> Iterator[Sequence[X]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


# Making anew ------------------------------------------------------------------------------------------------------


def _make_anew(storage: Storage) -> None:
    path = catalogue_path(storage)
    temporary = f"{path}.new"
    _remove_new(storage)
    try:
        catalogue = Catalogue.create(temporary, storage.storage_id)
        with contextlib.closing(catalogue):
            unfinished = storage.index.run_ids()
            for run_id in _fill(storage, catalogue, unfinished, checkpoints(storage)):
                storage.index.note_ended(run_id)  # listings go on reading it
            catalogue.seal()
        storage.disk.sync_file(temporary)
        failpoint("catalogue.before_replace")
        _remove_files(storage)
        failpoint("catalogue.before_rename")
        storage.disk.rename(temporary, path)
        storage.disk.sync_dir(os.path.dirname(path))
    except (OSError, sqlite3.Error):
        with contextlib.suppress(OSError):
            _remove_new(storage)  # a disk that is full stays full of it
        raise


def _remove_new(storage: Storage) -> None:
    directory = os.path.dirname(catalogue_path(storage))
    for name in listing(storage.disk, directory):
        if name.startswith(f"{_FILE}.new"):
            storage.disk.unlink(f"{directory}/{name}")


def _remove_files(storage: Storage) -> None:
    """Remove the catalogue for good. First itself: without its log it would be an older one that looks whole. And the
    log must not come back after a power loss, for SQLite would read it with the next one."""
    for suffix in ("", "-wal", "-shm"):
        storage.disk.unlink(f"{catalogue_path(storage)}{suffix}")
        failpoint("catalogue.after_unlink")
    storage.disk.sync_dir(os.path.dirname(catalogue_path(storage)))


def _fill(storage: Storage, catalogue: Catalogue, unfinished: set[str], compacted: CompactedRuns | None) -> list[str]:
    """All runs but the unfinished, from the checkpoints and from the journals that no checkpoint holds.

    Returns:
        Ids of those that have not ended and are not in the index either.
    """
    known: set[str] = set()
    lost = []
    for path, file in sorted(run_files(compacted).items()):
        assert compacted is not None
        rows = list(_rows_of(compacted, file, catalogue.add_part(path)))
        ids = {row.run_id for row in rows}
        if len(ids) < len(rows) or not ids.isdisjoint(known):
            where = compacted.path(file)
            raise CorruptJournalError(f"{where} holds a run that another checkpoint holds, too: restore it", path=where)
        known |= ids
        catalogue.add(rows)
    for run_id in storage.run_directories():
        if run_id not in known and run_id not in unfinished and not _look_at(storage, catalogue, run_id):
            lost.append(run_id)
    return lost


# The lock ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(storage: Storage, wait: bool) -> Iterator[bool]:
    disk, directory = storage.disk, f"{storage.root}/{_DIRECTORY}"
    ensure_directory(disk, directory)
    lock = f"{directory}/lock"
    disk.touch(lock)
    fd = disk.open_append(lock)
    try:
        deadline = time.monotonic() + _WAIT_S
        while not (held := disk.try_lock(fd)) and wait:
            if time.monotonic() > deadline:
                raise StorageError(f"another process has been making {catalogue_path(storage)} for too long", path=lock)
            time.sleep(_POLL_S)
        yield held
    finally:
        disk.close(fd)
