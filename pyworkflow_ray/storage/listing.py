"""Pages of runs, newest first, over any number of finished ones: what is unfinished is read, the rest looked up.

Called by `runs`, `sql` and the command line, in any process; calls `catalogue`, `stocktaking` and the storage. Rules:

* Unfinished runs come from the index `active` and are read from their own files. Ended ones come from the catalogue.
  In between lies `ended`: a run that ended is there until the catalogue holds it, durably.
* Looked at in the order `active`, `ended`, checkpoints, catalogue, so that a run that moves on is met at least once;
  the catalogue's row of a compacted run counts, then what was read, then any other row.
* Whoever finds something in `ended`, or other checkpoints than the catalogue knows, has it taken in (`stocktaking`).
  Where that can't be, what lies in `ended` is read as if it were unfinished.

Faults: a crash at any point (an entry of `ended` is taken in again), damaged runs (named, and hiding no others), runs
that end, are resumed, compacted or removed meanwhile, a full disk or a read-only one (the answer is the same, slower).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from pyworkflow_ray.errors import RunNotFoundError, StorageError
from pyworkflow_ray.storage.catalogue import Catalogue, DamagedCatalogue, LiveRow, Query, Row, inode
from pyworkflow_ray.storage.epochs import epoch_name, read_names
from pyworkflow_ray.storage.stocktaking import (
    BATCH,
    catalogue_path,
    checkpoints,
    discard,
    in_memory,
    keep_live,
    row_of,
    rows_of,
    run_files,
    take_in,
)
from pyworkflow_ray.storage.storage import RunHistory, Storage

if TYPE_CHECKING:
    from pyworkflow_ray.storage.checkpoint import CompactedRuns
    from pyworkflow_ray.storage.port import StoragePort

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES: Final = 5
_SETTLED_NS: Final = 2_000_000_000  # a directory that changed so shortly before it was read may change unseen


@dataclass(slots=True)
class Page:
    """Runs, newest first. more: others follow; go on with `before=rows[-1].key`. damaged: run id to what is wrong."""

    rows: list[Row] = field(default_factory=list)
    more: bool = False
    damaged: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stock:
    """Where the runs of a storage lie at one moment.

    journals: ids of all runs to be read from their journals, sorted. compacted: the checkpoints that hold the others;
    None where there are none. damaged: runs that could not be read when they were last looked at.
    """

    journals: list[str]
    compacted: CompactedRuns | None
    damaged: dict[str, str]


def page(storage: StoragePort, query: Query, limit: int | None = None) -> Page:
    """The newest `limit` runs that `query` takes. Damaged runs are named whatever it asks for.

    With a limit only those met on the way to it: no page looks at all unfinished runs for the sake of damage.

    Raises:
        StorageError: the storage can't be listed. CorruptJournalError: a checkpoint is damaged.
    """

    def ask(found: _Listing) -> Page:
        return _page(found.rows(query, everywhere=limit is None), limit, found.damaged)

    if not isinstance(storage, Storage):
        rows, damaged = _scan_bucket(storage, query)
        return _page(iter(rows), limit, damaged)
    return _asking(storage, ask)


def scan(storage: StoragePort, query: Query) -> tuple[list[Row], dict[str, str]]:
    """The same without a catalogue and with every run read: what tests compare with."""
    return _rows_by_reading(storage, storage.list_run_ids(), [], query)


def _scan_bucket(storage: StoragePort, query: Query) -> tuple[list[Row], dict[str, str]]:
    """The same where there is no catalogue: checkpoints tell of the runs they hold, and every other run is read."""
    run_ids = storage.run_directories()  # before the manifest, so that a run that moves meanwhile is met
    known: list[Row] = []
    if storage.checkpoints.manifest().batches:
        from pyworkflow_ray.storage.checkpoint import with_compacted

        known = with_compacted(storage, lambda compacted: list(rows_of(compacted)))
    held = {row.run_id for row in known}
    return _rows_by_reading(storage, [run_id for run_id in run_ids if run_id not in held], known, query)


def _rows_by_reading(
    storage: StoragePort, run_ids: Iterable[str], known: list[Row], query: Query
) -> tuple[list[Row], dict[str, str]]:
    rows, damaged = list(known), {}
    for run_id, history in read_many(storage, run_ids):
        try:
            if isinstance(history, StorageError):
                raise history
            rows.append(row_of(run_id, history.events))
        except StorageError as error:
            damaged[run_id] = str(error)
    return sorted(filter(query.takes, rows), key=lambda row: row.key, reverse=True), damaged


def read_many(storage: StoragePort, run_ids: Iterable[str]) -> Iterator[tuple[str, RunHistory | StorageError]]:
    """Histories of runs, in order, `at_once` at a time; of a damaged one its error. Those that are gone are left out.

    Raises:
        What is no fault of the run: a bucket that can't be reached, for one.
    """

    def read(run_id: str) -> RunHistory | StorageError | None:
        try:
            return storage.read_run(run_id)
        except RunNotFoundError:
            return None
        except StorageError as error:
            return error

    with ThreadPoolExecutor(storage.at_once, "reading") as pool:
        work = pool.map if storage.at_once > 1 else map  # no threads where they gain nothing
        for chunk in _chunks(run_ids, 4 * storage.at_once):  # so that no more of them than that are in memory
            for run_id, found in zip(chunk, work(read, chunk), strict=True):
                if found is not None:
                    yield run_id, found


def _chunks(run_ids: Iterable[str], size: int) -> Iterator[list[str]]:
    left = iter(run_ids)
    while chunk := list(itertools.islice(left, size)):
        yield chunk


def _page(rows: Iterator[Row], limit: int | None, damaged: dict[str, str]) -> Page:
    taken = list(rows if limit is None else itertools.islice(rows, limit + 1))
    return Page(taken[:limit], limit is not None and len(taken) > limit, damaged)


def find(storage: StoragePort, run_id: str) -> Row:
    """One run's row.

    Raises:
        RunNotFoundError, StorageError: as `Storage.read_run`.
    """

    def ask(found: _Listing) -> Row | None:
        return None if run_id in found.ids else found.catalogue.run(run_id)

    found = _asking(storage, ask, live=False) if isinstance(storage, Storage) else None
    return found or row_of(run_id, storage.read_run(run_id).events)


def stock(storage: Storage) -> Stock:
    """Where all runs lie; for SQL and compaction, which so scan no history."""

    def ask(found: _Listing) -> Stock:
        journals = sorted({*found.ids, *found.catalogue.in_journals()})
        return Stock(journals, found.compacted, found.catalogue.damaged())

    return _asking(storage, ask, live=False)


# One look at the storage ------------------------------------------------------------------------------------------


@dataclass
class _Listing:
    """What one look found. ids: runs that are read, not looked up. fresh: of `live`, what was read just now."""

    storage: Storage
    catalogue: Catalogue
    compacted: CompactedRuns | None
    ids: set[str]
    live: dict[str, LiveRow] = field(default_factory=dict)
    fresh: list[LiveRow] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)

    def read(self, run_id: str) -> LiveRow | None:
        try:
            stamp = _stamp(self.storage, run_id)
            row = LiveRow(row_of(run_id, self.storage.read_run(run_id).events), stamp)
        except RunNotFoundError:
            return None  # never came to be, or is gone
        except StorageError as error:
            self.damaged[run_id] = str(error)
            return None
        self.live[run_id] = row
        self.fresh.append(row)
        return row

    def rows(self, query: Query, *, everywhere: bool) -> Iterator[Row]:
        """everywhere: also look at unfinished runs that did not fit when they were last read: they may be damaged."""
        ended = (row for row in self.catalogue.newest(query) if row.run_id not in self.ids)
        return heapq.merge(self._unfinished(query, everywhere), ended, key=lambda row: row.key, reverse=True)

    def _unfinished(self, query: Query, everywhere: bool) -> Iterator[Row]:
        whatever = Query(None, query.workflow, query.attributes, query.since, query.before)
        known = [live for live in self.live.values() if everywhere or whatever.takes(live.run)]
        for live in sorted(known, key=lambda live: live.run.key, reverse=True):
            as_it_is = live if _unchanged(self.storage, live) else self.read(live.run.run_id)
            if as_it_is is not None and query.takes(as_it_is.run):
                yield as_it_is.run


def _asking(storage: Storage, ask: Callable[[_Listing], T], *, live: bool = True) -> T:
    for left in range(_TRIES, 0, -1):
        file = inode(catalogue_path(storage))
        try:
            found = _look(storage)
            with contextlib.closing(found.catalogue):
                if live:
                    _find_live(found)
                answer = ask(found)
        except DamagedCatalogue as error:
            logger.warning("the catalogue of %s is made anew: %s", storage.root, error)
            discard(storage, file)
        except sqlite3.Error as error:
            if left == 1:
                path = catalogue_path(storage)
                raise StorageError(f"{path} can't be read: {error}", path=path) from error
        else:
            keep_live(storage, found.fresh)
            return answer
    raise StorageError(f"{storage.root}: its catalogue was damaged {_TRIES} times in a row", path=storage.root)


def _look(storage: Storage) -> _Listing:
    """The index, then what has just ended, then the checkpoints, then a catalogue that holds all the rest."""
    for number in range(_TRIES):
        ids = storage.index.run_ids()
        ended = storage.index.ended()
        compacted = checkpoints(storage)
        try:
            catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id)
        except sqlite3.Error as error:
            logger.info("the catalogue of %s can't be opened: %s", storage.root, error)
            break
        current = catalogue is not None and catalogue.parts().keys() == run_files(compacted).keys()
        if catalogue is not None and current and (number > 0 or not ended):
            return _listing(storage, catalogue, compacted, ids.union(run_id for run_id, _ in ended))
        if catalogue is not None:
            catalogue.close()
        if not take_in(storage, wait=not current or len(ended) > BATCH) and not current:
            break
    ids = storage.index.run_ids()
    compacted = checkpoints(storage)
    return _listing(storage, in_memory(storage, ids, compacted), compacted, ids)


def _listing(storage: Storage, catalogue: Catalogue, compacted: CompactedRuns | None, ids: set[str]) -> _Listing:
    """Of a run that a checkpoint holds the index may still have an entry, after a power loss say: it is not read. A
    damaged one is, each time: it may have been restored."""
    try:
        live = catalogue.live()
        ids |= catalogue.damaged().keys()
        ids -= catalogue.live_in_parts()
        for run_id in sorted(ids - live.keys()):
            row = catalogue.run(run_id)
            if row is not None and row.part is not None:
                ids.discard(run_id)
        known = {run_id: row for run_id, row in live.items() if run_id in ids}
        return _Listing(storage, catalogue, compacted, ids, live=known)
    except BaseException:
        catalogue.close()
        raise


def _find_live(found: _Listing) -> None:
    for run_id in sorted(found.ids - found.live.keys()):
        found.read(run_id)


# Whether a run's files are as they were ---------------------------------------------------------------------------


def _stamp(storage: Storage, run_id: str) -> str:
    """What `_unchanged` compares, taken before the run is read; "" where a change might not show in it."""
    directory = storage.directory(run_id)
    try:
        own = storage.disk.identity(directory)
        newest = epoch_name(read_names(storage.disk.listdir(directory)).newest)
        if time.time_ns() - own[2] < _SETTLED_NS:
            return ""  # clocks of file systems tick in milliseconds: another epoch may begin within this tick
        return f"{newest} {own} {storage.disk.identity(f'{directory}/{newest}')}"
    except OSError:
        return ""


def _unchanged(storage: Storage, live: LiveRow) -> bool:
    newest, _, rest = live.stamp.partition(" ")
    if not newest:
        return False
    directory, identity = storage.directory(live.run.run_id), storage.disk.identity
    try:
        return rest == f"{identity(directory)} {identity(f'{directory}/{newest}')}"
    except OSError:
        return False
