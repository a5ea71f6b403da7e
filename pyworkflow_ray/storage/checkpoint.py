"""Finished runs as date-partitioned Parquet: compaction, and reading compacted runs back.

Called by the command line (`storage compact`, in a process of its own), by `sql`, and by `Storage.read_run` for a run
whose journal was retired; calls tables, disk, checked. Faults: a crash between any two steps (failpoints `compact.*`),
a full disk, another compactor at the same time, damaged files. Layout below the storage's root:

    checkpoints/manifests/TOKEN.json                  one a batch: its files with their sizes and SHA-256
    checkpoints/date=YYYY-MM-DD/TABLE-TOKEN.parquet   runs, events, steps, attempts of runs created on that day (UTC)

Rules:
* A Parquet file counts once a manifest names it, and a manifest is written (temporary file, fsync, link, fsync of the
  directory) only when all its files are durable. What no manifest names is left of a crash and removed by the next
  compaction.
* A run's journal is retired only after the manifest that holds it is durable. A crash in between leaves a run in both
  places: its journal then counts, and the next compaction retires it after comparing the two, event by event.
* Completed and cancelled runs only: `resume` of a failed run goes on in its journal.
* The bytes of a file are hashed as they are read and read only if the hash is the manifest's: one flipped bit anywhere
  is an error that names the file.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from pyworkflow_ray.engine.events import Event, RunCancelled, RunCompleted, RunCreated
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.record import parse_event
from pyworkflow_ray.storage.tables import TABLES, Rows

if TYPE_CHECKING:
    from pyworkflow_ray.storage.storage import RunHistory, Storage

FORMAT: Final = 1
MAX_BATCH_EVENTS: Final = 100_000  # of one manifest: about 100 MB of memory while it is written
_ROW_GROUP: Final = 20_000
_FILES_KEPT: Final = 4  # in memory, of events: at most some tens of megabytes


@dataclass(slots=True, frozen=True)
class ParquetFile:
    """One file as its manifest describes it. `first` and `last` are its smallest and largest run id."""

    table: str
    path: str
    bytes: int
    sha256: str
    rows: int
    first: str
    last: str


@dataclass(slots=True)
class Compaction:
    """What one call of `compact` did.

    damaged: runs that could not be read, with the error. kept: finished runs that stay in
        their journals, such as failed ones.
    retired: runs that an earlier compaction had written and not yet retired.
    """

    runs: int = 0
    events: int = 0
    files: int = 0
    bytes: int = 0
    retired: int = 0
    kept: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)


# Reading ----------------------------------------------------------------------------------------------------------


class CompactedRuns:
    """The compacted runs of a storage, as its manifests stand at construction.

    Raises:
        CorruptJournalError: a manifest is damaged; `.path` names it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._disk = storage.disk
        self._root = f"{storage.root}/checkpoints"
        self.manifests = self._names(f"{self._root}/manifests", ".json")
        self.files = [file for name in self.manifests for file in self._manifest(name)]
        self._ids: dict[str, str] | None = None
        self._read_files: dict[str, tuple[pa.Table, dict[str, tuple[int, int]]]] = {}

    def current(self) -> bool:
        """Whether the manifests are still those of construction."""
        return self._names(f"{self._root}/manifests", ".json") == self.manifests

    def _names(self, path: str, suffix: str) -> list[str]:
        try:
            return sorted(name for name in self._disk.listdir(path) if name.endswith(suffix))
        except FileNotFoundError:
            return []

    def _manifest(self, name: str) -> list[ParquetFile]:
        path = f"{self._root}/manifests/{name}"
        content = decode_checked(f"checkpoints/manifests/{name}", self._read(path), path)
        if content["format"] != FORMAT:
            raise StorageError(f"{path} has format {content['format']!r}: upgrade pyworkflow-ray", path=path)
        if content["storage_id"] != self._storage.storage_id:
            raise CorruptJournalError(f"{path} belongs to storage {content['storage_id']}: remove it", path=path)
        return [ParquetFile(**file) for file in content["files"]]

    def _read(self, path: str) -> bytes:
        try:
            return self._disk.read(path)
        except FileNotFoundError:
            raise CorruptJournalError(f"{path} is missing: restore it", path=path) from None
        except OSError as error:
            raise StorageError(f"{path} can't be read: {error}", path=path) from error

    def path(self, file: ParquetFile) -> str:
        """Where `file` lies."""
        return f"{self._root}/{file.path}"

    def table(self, file: ParquetFile, **options: Any) -> pa.Table:
        """A file's rows, of exactly the bytes that were hashed; `options` are pyarrow's (`columns`, `filters`).

        Raises:
            CorruptJournalError: the file is missing, or one bit of it is not as it was written.
        """
        path = self.path(file)
        data = self._read(path)
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise CorruptJournalError(
                f"{path} is damaged: its content has another SHA-256 than its manifest says. Restore it", path=path
            )
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, partitioning=None, **options)
        if not options and table.num_rows != file.rows:
            raise CorruptJournalError(f"{path} holds {table.num_rows} rows, its manifest says {file.rows}", path=path)
        return table

    def ids(self) -> dict[str, str]:
        """The uid of every compacted run, by run id.

        Raises:
            CorruptJournalError: a file is damaged, or a run is in two of them.
        """
        if self._ids is None:
            ids: dict[str, str] = {}
            for file in self._files("runs"):
                table = self.table(file, columns=["run_id", "run_uid"])
                for run_id, uid in zip(*(column.to_pylist() for column in table.columns), strict=True):
                    if run_id in ids:
                        raise CorruptJournalError(f"run {run_id!r} is in two checkpoints", path=self.path(file))
                    ids[run_id] = uid
            self._ids = ids
        return self._ids

    def _files(self, table: str) -> list[ParquetFile]:
        return [file for file in self.files if file.table == table]

    def read(self, run_id: str) -> RunHistory:
        """A compacted run's whole history, as `Storage.read_run` gave it before.

        Raises:
            RunNotFoundError: no checkpoint holds the run.
            CorruptJournalError: the file that may hold it is damaged.
        """
        from pyworkflow_ray.storage.storage import RunHistory

        for file in self._files("events"):
            if file.first <= run_id <= file.last:
                table, places = self._events_of(file)
                if run_id in places:
                    rows = table.slice(*places[run_id]).to_pylist()
                    events = [self._event(row, file) for row in rows]
                    epochs = [row["epoch"] for row in rows]
                    return RunHistory(
                        run_id=run_id,
                        events=events,
                        epochs=epochs,
                        epoch=epochs[-1],
                        lease="",
                        torn=False,
                        detail="",
                        finished=True,
                        settled=True,
                    )
        raise RunNotFoundError(f"no checkpoint of {self._storage.root} holds run {run_id!r}", run_id=run_id)

    def _events_of(self, file: ParquetFile) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
        """A file of events, and where each run's lie in it. The last few files are kept: a listing reads every run."""
        if file.path not in self._read_files:
            table, places = self.table(file), {}
            start = 0
            for run_id, run in itertools.groupby(table["run_id"].to_pylist()):
                count = sum(1 for _ in run)
                places[run_id] = (start, count)
                start += count
            while len(self._read_files) >= _FILES_KEPT:
                self._read_files.pop(next(iter(self._read_files)))
            self._read_files[file.path] = (table, places)
        return self._read_files[file.path]

    def _event(self, row: dict[str, Any], file: ParquetFile) -> Event:
        head = b'{"seq":%d,"epoch":%d,%s"event":' % (row["seq"], row["epoch"], b'"safe":true,' if row["safe"] else b"")
        try:
            return parse_event(head + row["data"].encode() + b"}")
        except CorruptJournalError as error:
            raise CorruptJournalError(f"{self.path(file)}: {error}", path=self.path(file)) from error

    def check(self) -> list[StorageError]:
        """Read everything: the errors that were found, none where all is well."""
        errors: list[StorageError] = []
        for file in self.files:
            try:
                self.table(file)
            except StorageError as error:
                errors.append(error)
        return errors

    def orphans(self) -> list[str]:
        """Parquet files that no manifest names: left of a crash."""
        known = {file.path for file in self.files}
        return [
            f"{self._root}/{partition}/{name}"
            for partition in self._names(self._root, "")
            if partition.startswith("date=")
            for name in self._names(f"{self._root}/{partition}", "")
            if f"{partition}/{name}" not in known
        ]


# Compacting -------------------------------------------------------------------------------------------------------


def compact(storage: Storage, *, max_batch_events: int = MAX_BATCH_EVENTS) -> Compaction:
    """Move finished runs into Parquet. Live runs never wait for it; call it from a process of its own.

    Failed runs stay in their journals, for `resume` goes on there; they are in the SQL views all the same.

    Raises:
        StorageError: another compaction is under way, or the disk refused; nothing is lost and calling again goes on.
        CorruptJournalError: a manifest or Parquet file is damaged. Damaged journals are reported, not raised.
    """
    done = Compaction()
    with _exclusive(storage):
        compacted = CompactedRuns(storage)
        for path in compacted.orphans():
            storage.disk.unlink(path)
        batches: dict[str, list[RunHistory]] = {}
        for run_id in storage.list_run_ids(finished=True):
            if storage.is_retired(run_id):
                storage.retire_run(run_id)  # what a crash left of its journal goes too
                continue
            history = _finished(storage, run_id, done)
            if history is None:
                continue
            if run_id in compacted.ids():
                _check_equal(compacted.read(run_id), history)
                _retire(storage, [history])
                done.retired += 1
                continue
            date = _date(history)
            batches.setdefault(date, []).append(history)
            if sum(len(one.events) for one in batches[date]) >= max_batch_events:
                _publish(storage, date, batches.pop(date), done)
        for date, histories in batches.items():
            _publish(storage, date, histories, done)
    return done


@contextlib.contextmanager
def _exclusive(storage: Storage) -> Iterator[None]:
    disk, root = storage.disk, storage.root
    try:
        for path in (f"{root}/checkpoints", f"{root}/checkpoints/manifests"):
            if not disk.exists(path):
                with contextlib.suppress(FileExistsError):
                    disk.mkdir(path)
                disk.sync_dir(os.path.dirname(path))
        lock = f"{root}/checkpoints/lock"
        disk.touch(lock)
        fd = disk.open_append(lock)
    except OSError as error:
        raise StorageError(f"compacting {root} failed: {error}", path=root) from error
    try:
        if not disk.try_lock(fd):
            raise StorageError(f"another compaction of {root} is under way: wait for it", path=lock)
        yield
    finally:
        disk.close(fd)


def _finished(storage: Storage, run_id: str, done: Compaction) -> RunHistory | None:
    """The run's history if its journal can go; None where it is gone, goes on, or is damaged."""
    try:
        history = storage.read_run(run_id)
    except RunNotFoundError:
        return None
    except StorageError as error:
        done.damaged.append((run_id, str(error)))
        return None
    if not (history.finished and history.settled and isinstance(history.events[-1], (RunCompleted, RunCancelled))):
        done.kept += 1
        return None
    return history


def _check_equal(compacted: RunHistory, journal: RunHistory) -> None:
    if [to_json(event) for event in compacted.events] != [to_json(event) for event in journal.events]:
        raise CorruptJournalError(f"run {journal.run_id!r}: its checkpoint and its journal differ; neither was removed")


def _date(history: RunHistory) -> str:
    created = history.events[0]
    assert isinstance(created, RunCreated)
    return dt.datetime.fromtimestamp(created.at, dt.UTC).date().isoformat()


def _publish(storage: Storage, date: str, histories: list[RunHistory], done: Compaction) -> None:
    """Write a batch and its manifest, durably, then retire its journals."""
    disk, token = storage.disk, storage.disk.token()
    directory = f"{storage.root}/checkpoints/date={date}"
    histories = sorted(histories, key=lambda history: history.run_id)
    rows = Rows()
    for history in histories:
        rows.add(history)
    try:
        if not disk.exists(directory):
            disk.mkdir(directory)
            disk.sync_dir(os.path.dirname(directory))
        files = []
        for name in TABLES:
            failpoint("compact.before_file")
            path, data = f"date={date}/{name}-{token}.parquet", _parquet(rows.table(name))
            disk.write_file(f"{storage.root}/checkpoints/{path}", data)
            size, sha = len(data), hashlib.sha256(data).hexdigest()
            first, last = histories[0].run_id, histories[-1].run_id
            files.append(ParquetFile(name, path, size, sha, len(rows.rows[name]), first, last))
        failpoint("compact.before_sync_dir")
        disk.sync_dir(directory)
        _write_manifest(storage, token, files)
    except OSError as error:
        raise StorageError(f"compacting {storage.root} failed: {error}. Nothing was removed", path=directory) from error
    _retire(storage, histories)
    done.runs += len(histories)
    done.events += len(rows.rows["events"])
    done.files += len(files)
    done.bytes += sum(file.bytes for file in files)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=_ROW_GROUP)
    return sink.getvalue()


def _write_manifest(storage: Storage, token: str, files: list[ParquetFile]) -> None:
    disk, name = storage.disk, f"{token}.json"
    content = {
        "format": FORMAT,
        "storage_id": storage.storage_id,
        "files": [{key: getattr(file, key) for key in ParquetFile.__slots__} for file in files],
    }
    temporary = f"{storage.root}/tmp/{disk.token()}"
    failpoint("compact.before_manifest")
    disk.write_file(temporary, encode_checked(f"checkpoints/manifests/{name}", content))
    failpoint("compact.before_link")
    disk.link(temporary, f"{storage.root}/checkpoints/manifests/{name}")
    failpoint("compact.before_manifest_sync")
    disk.sync_dir(f"{storage.root}/checkpoints/manifests")
    disk.unlink(temporary)


def _retire(storage: Storage, histories: list[RunHistory]) -> None:
    for history in histories:
        failpoint("compact.before_retire")
        storage.retire_run(history.run_id)
    failpoint("compact.after_retire")
