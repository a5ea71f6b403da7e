"""Reading compacted runs: the Parquet files that the manifest names, whole files and single runs.

Called by `sql`, and by `Storage.read_run` for a run whose journal is gone; calls tables, checkpoint_manifest,
checkpoint_files. `compact` writes what is read here. Layout below the storage's root:

    checkpoints/manifests/N.json                      names all that follows, with sizes and SHA-256
    checkpoints/date=YYYY-MM-DD/TABLE-TOKEN.parquet   runs, events, steps, attempts of runs created on that day (UTC)
    checkpoints/date=YYYY-MM-DD/live-TOKEN.parquet    closed epochs of one run that was not finished, see `compact_live`
    checkpoints/ids/TOKEN.ids                         which ids there are, see `checkpoint_ids`

Rules:

* A run that the manifest holds is read from its checkpoint; what its directory still holds does not count.
* The bytes of a file, or of a row group, are hashed as they are read and read only if the hash is the manifest's: one
  flipped bit anywhere is an error that names the file.
* Files are never changed. A reader that misses one asks whether the manifest is still the same, and begins again.

Faults: damaged and missing files, a compaction that merges or removes files under a reader's hands.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.checkpoint_files import Files
from pyworkflow_ray.storage.checkpoint_manifest import Group, Manifest, ParquetFile
from pyworkflow_ray.storage.record import parse_event

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint_ids import Checkpoints
    from pyworkflow_ray.storage.storage import RunHistory

Answer = TypeVar("Answer")
_KEPT_BYTES: Final = 64 * 2**20  # of row groups, in memory
_TRIES: Final = 20


class Holder(Protocol):
    """A storage of any kind."""

    @property
    def root(self) -> str: ...

    @property
    def checkpoints(self) -> Checkpoints: ...


class CheckpointChanged(StorageError):
    """A file went because a compaction replaced it: read the manifest again. See `with_compacted`."""


def with_compacted(storage: Holder, read: Callable[[CompactedRuns], Answer]) -> Answer:
    """What `read` makes of the compacted runs; again where a compaction replaced files meanwhile."""
    return with_retries(lambda: read(CompactedRuns(storage)))


def with_retries(read: Callable[[], Answer]) -> Answer:
    """As `with_compacted`, of a reading that finds the compacted runs by itself."""
    for left in range(_TRIES, 0, -1):
        try:
            return read()
        except CheckpointChanged:
            if left == 1:
                raise
    raise AssertionError("not reached")


class CompactedRuns:
    """The compacted runs of a storage, as its manifest stands at construction.

    Attributes:
        files: the Parquet files of the tables runs, events, steps and attempts.

    Raises:
        CorruptJournalError: the manifest is damaged; `.path` names it.
    """

    def __init__(self, storage: Holder) -> None:
        self._storage = storage
        self._store: Files = storage.checkpoints.files
        self.manifest: Final[Manifest] = storage.checkpoints.manifest()
        self.files: Final[list[ParquetFile]] = [file for batch in self.manifest.batches for file in batch.files]
        self._ids: dict[str, str] | None = None
        self._kept: dict[tuple[str, int], tuple[pa.Table, dict[str, tuple[int, int]]]] = {}

    def current(self) -> bool:
        """Whether the manifest is still that of construction."""
        return self._storage.checkpoints.manifest().number == self.manifest.number

    def path(self, file: ParquetFile) -> str:
        """Where `file` lies."""
        return self._store.path(file.path)

    def _read(self, file: ParquetFile, start: int = 0, length: int | None = None) -> bytes:
        path = self.path(file)
        try:
            return self._store.read(file.path, start, length)
        except FileNotFoundError:
            if not self.current():
                raise CheckpointChanged(f"{path} was replaced meanwhile", path=path) from None
            raise CorruptJournalError(f"{path} is missing: restore it", path=path) from None
        except OSError as error:
            raise StorageError(f"{path} can't be read: {error}", path=path) from error

    def _damaged(self, file: ParquetFile) -> CorruptJournalError:
        path = self.path(file)
        text = f"{path} is damaged: its content has another SHA-256 than its manifest says. Restore it"
        return CorruptJournalError(text, path=path)

    def content(self, file: ParquetFile) -> bytes:
        """A file's bytes, which are those that were written. Raises as `table`."""
        data = self._read(file)
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise self._damaged(file)
        return data

    def table(self, file: ParquetFile, **options: Any) -> pa.Table:
        """A file's rows, of exactly the bytes that were hashed; `options` are pyarrow's (`columns`, `filters`).

        Raises:
            CorruptJournalError: the file is missing, or one bit of it is not as it was written.
            CheckpointChanged: a compaction replaced it.
        """
        data = self.content(file)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, partitioning=None, **options)
        if not options and table.num_rows != file.rows:
            path = self.path(file)
            raise CorruptJournalError(f"{path} holds {table.num_rows} rows, its manifest says {file.rows}", path=path)
        return table

    def group(self, file: ParquetFile, number: int) -> pa.Table:
        """The rows of one row group of a file of events, without reading the others. Raises as `table`."""
        group, (footer_at, footer_sha) = file.groups[number], file.footer
        footer = self._read(file, footer_at, file.bytes - footer_at)
        data = self._read(file, group.start, group.length)
        if (
            hashlib.sha256(footer).hexdigest() != footer_sha
            or hashlib.sha256(data).hexdigest() != group.sha256
            or len(footer) != file.bytes - footer_at
        ):
            raise self._damaged(file)
        whole = mmap.mmap(-1, file.bytes)  # what is not written to takes no memory
        whole[group.start : group.start + group.length] = data
        whole[footer_at:] = footer
        return pq.ParquetFile(pa.py_buffer(whole), page_checksum_verification=True).read_row_group(number)

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

    # Single runs

    def read(self, run_id: str) -> RunHistory:
        """A compacted run's whole history, as `Storage.read_run` gave it before.

        Raises:
            RunNotFoundError: no checkpoint holds the run.
            CorruptJournalError: the file that may hold it is damaged.
            CheckpointChanged: a compaction replaced it.
        """
        dates = self._storage.checkpoints.dates(run_id)
        for batch in self.manifest.batches:
            if batch.date in dates:
                for file in batch.files:
                    if file.table == "events" and file.first <= run_id <= file.last:
                        rows = list(self._rows(file, run_id))
                        if rows:
                            return self._history(run_id, rows, file)
        if not self.current():
            path = self._store.path("")
            raise CheckpointChanged(f"{path} was compacted while run {run_id!r} was looked for", path=path)
        raise RunNotFoundError(f"no checkpoint of {self._storage.root} holds run {run_id!r}", run_id=run_id)

    def _rows(self, file: ParquetFile, run_id: str) -> Iterator[dict[str, Any]]:
        for number, group in enumerate(file.groups):
            if group.first <= run_id <= group.last:
                table, places = self._places(file, number, group)
                if run_id in places:
                    yield from table.slice(*places[run_id]).to_pylist()

    def _places(self, file: ParquetFile, number: int, group: Group) -> tuple[pa.Table, dict[str, tuple[int, int]]]:
        """A row group and where each run's events lie in it. The last few are kept: a listing reads every run."""
        found = self._kept.pop((file.path, number), None)
        if found is None:
            table, places, start = self.group(file, number), {}, 0
            if table.num_rows != group.rows:
                raise self._damaged(file)
            for run_id, run in itertools.groupby(table["run_id"].to_pylist()):
                count = sum(1 for _ in run)
                places[run_id] = (start, count)
                start += count
            found = (table, places)
            while self._kept and sum(kept.nbytes for kept, _ in self._kept.values()) + table.nbytes > _KEPT_BYTES:
                self._kept.pop(next(iter(self._kept)))
        self._kept[(file.path, number)] = found
        return found

    def _history(self, run_id: str, rows: list[dict[str, Any]], file: ParquetFile) -> RunHistory:
        from pyworkflow_ray.storage.storage import RunHistory

        path = self.path(file)
        events = [event_of(row, path) for row in rows]
        if [event.seq for event in events] != list(range(len(events))):
            raise CorruptJournalError(f"{path}: events of run {run_id!r} are missing", path=path)
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

    # Everything

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
        """Files that the manifest does not name: left of a crash, or of a merge."""
        known, found = self.manifest.names(), []
        for directory in sorted(name for name in self._store.list() if name.startswith("date=") or name == "ids"):
            found += [f"{directory}/{name}" for name in sorted(self._store.list(directory))]
        return [name for name in found if name not in known]


def event_body_of(row: dict[str, Any]) -> bytes:
    """The body of the journal's record that a row of `events` was."""
    safe = b'"safe":true,' if row["safe"] else b""
    return b'{"seq":%d,"epoch":%d,%s"event":%s}' % (row["seq"], row["epoch"], safe, row["data"].encode())


def event_of(row: dict[str, Any], path: str) -> Event:
    """The event in a row of `events`; CorruptJournalError, naming `path`, where it is none."""
    try:
        return parse_event(event_body_of(row))
    except CorruptJournalError as error:
        raise CorruptJournalError(f"{path}: {error}", path=path) from error
