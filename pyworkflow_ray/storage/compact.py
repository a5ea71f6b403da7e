"""Compaction: runs that ended go to Parquet, so do closed epochs of long live ones; small batches merge; old runs go.

Called by `storage compact` and by the controller's upkeep, always in a process of its own: no run waits for it. Calls
checkpoint_write, compact_live, journal, tables. Decision 11 has the reasons. Rules:

* A run is written once it is final (`journal.make_final`), and counts from the checkpoint once the manifest is durable;
  only then its directory goes. Failed runs can be resumed: they stay until `failed_after_s` or their retention.
* What is written is new files and then one manifest, published by exclusive creation. Files that the manifest before
  named and the new one does not go after it is durable. What a crash leaves behind the next compaction removes.
* Retention: a run's directory is gone, durably, before the manifest that forgets it, so that no journal comes back.

Faults: a crash between any two steps (failpoints), a full disk, another compaction, runs that are resumed, taken over,
folded and read meanwhile, damaged journals (reported, left alone) and damaged checkpoints (raised).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pyworkflow_ray.engine.events import Event, RunCancelled, RunCompleted, RunCreated, RunFailed
from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError, FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage import compact_live
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.checkpoint_ids import decode_ids, id_entry
from pyworkflow_ray.storage.checkpoint_manifest import Batch, Manifest, numbers, publish_manifest
from pyworkflow_ray.storage.checkpoint_write import take, write_batch, write_ids
from pyworkflow_ray.storage.journal import RETIRED, disk_error, make_final
from pyworkflow_ray.storage.lease import lease_states
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.tables import TABLES, Rows

BATCH_EVENTS: Final = 100_000  # of one batch as it is first written: about 100 MB of memory
LIVE_BYTES: Final = 4 * 2**20  # of closed epochs in journals
FULL_BYTES: Final = 64 * 2**20  # of rows: such a batch is merged no more
_CLASS_BYTES: Final = 2**20
_CLASS_IDS: Final = 1024
_MERGED: Final = 4  # batches, or lists, of one class become one
_COLD_DAYS: Final = 2
Item = TypeVar("Item")
STATUSES: Final = {RunCompleted: "completed", RunFailed: "failed", RunCancelled: "cancelled"}


@dataclass(slots=True, frozen=True)
class Rules:
    """What a compaction takes.

    older_than_s: runs that ended at least so long ago. above_bytes: all that ended, where their journals take more
        than this. failed_after_s: failed runs too, so long after their end; they can't be resumed then. None: none.
    retain_s: by status ("completed", "failed", "cancelled"), for how long a run is kept after its end.
    live_bytes: closed epochs of a live run move once so much of them lies in journals.
    """

    older_than_s: float = 0.0
    above_bytes: int | None = None
    failed_after_s: float | None = None
    retain_s: Mapping[str, float] = field(default_factory=dict)
    live_bytes: int = LIVE_BYTES
    batch_events: int = BATCH_EVENTS

    def __post_init__(self) -> None:
        for status, seconds in self.retain_s.items():
            if status not in STATUSES.values() or seconds < 0:
                raise ConfigurationError(
                    f"retain {status}={seconds}: give completed, failed or cancelled, and a duration from 0"
                )

    def takes_failed_after_s(self) -> float | None:
        given = [s for s in (self.failed_after_s, self.retain_s.get("failed")) if s is not None]
        return min(given, default=None)


@dataclass(slots=True)
class Compaction:
    """What one call of `compact` did, or would do.

    kept: ended runs that stay in their journals: too young (`young`), or failed. live: runs whose closed epochs moved.
    merged: batches that became parts of larger ones. dropped: runs that retention removed. retired: runs of which an
    earlier compaction had left the directory. damaged: runs that could not be read, with the error.
    """

    runs: int = 0
    events: int = 0
    files: int = 0
    bytes: int = 0
    kept: int = 0
    young: int = 0
    live: int = 0
    merged: int = 0
    dropped: int = 0
    retired: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _History:
    run_id: str
    events: list[Event]
    epochs: list[int]


def compact(
    storage: Storage, rules: Rules | None = None, *, now: float | None = None, dry_run: bool = False
) -> Compaction:
    """Move what `rules` name (default: all that completed or was cancelled) into Parquet, merge, and forget.

    Args:
        now: UNIX time that ages are counted from; default: the clock's. dry_run: only count; nothing is written.

    Raises:
        StorageError: another compaction is under way, or the disk refused; nothing is lost and calling again goes on.
        CorruptJournalError: the manifest or a checkpoint is damaged. Damaged journals are reported, not raised.
    """
    work = _Work(storage, rules or Rules(), time.time() if now is None else now)
    if dry_run:
        work.count()
        return work.done
    with _exclusive(storage):
        try:
            work.all()
        except OSError as error:
            text = "Nothing that counts was removed; call it again"
            raise disk_error("compacting", storage.root, error, text) from error
    return work.done


@contextlib.contextmanager
def _exclusive(storage: Storage) -> Iterator[None]:
    """One compaction at a time: not for safety, but lest two do the same work, or sweep away what the other writes."""
    disk, directory = storage.disk, f"{storage.root}/checkpoints"
    try:
        storage.ensure_directories()
        if not disk.exists(directory):
            with contextlib.suppress(FileExistsError):
                disk.mkdir(directory)
            disk.sync_dir(storage.root)
        lock = f"{directory}/lock"
        disk.touch(lock)
        fd = disk.open_append(lock)
    except OSError as error:
        raise disk_error("compacting", storage.root, error) from error
    try:
        try:
            alone = disk.try_lock(fd)
        except OSError as error:
            raise disk_error("locking", lock, error) from error
        if not alone:
            raise StorageError(f"another compaction of {storage.root} is under way: wait for it", path=lock)
        yield
    finally:
        with contextlib.suppress(OSError):  # the descriptor is gone all the same, and the lock with it
            disk.close(fd)


class _Work:
    """One compaction. `manifest` is the one that counts now."""

    def __init__(self, storage: Storage, rules: Rules, now: float) -> None:
        self.storage = storage
        self.rules = rules
        self.now = now
        self.done = Compaction()
        self.files = storage.checkpoints.files
        self.manifest = Manifest()

    def all(self) -> None:
        self.manifest = self.storage.checkpoints.manifest()
        if self.manifest.number < 0:
            self._publish(self.manifest)
        self._sweep()
        self._move_ended()
        self._move_closed()
        self._forget()
        self._merge()

    def count(self) -> None:
        """What `all` would do, from reading alone."""
        self.manifest = self.storage.checkpoints.manifest()
        for run_id in self._ended():
            history = self._read(run_id)
            if history is not None:
                self.done.runs += 1
                self.done.events += len(history.events)
        self.done.live = sum(1 for _ in self._long_live())
        self.done.dropped = sum(len(dropped) for _, dropped in self._expired())

    # The manifest

    def _publish(self, manifest: Manifest) -> None:
        """Make this the manifest that counts; then remove the files that only the one before named."""
        before = self.manifest.names()
        manifest = dataclasses.replace(manifest, number=self.manifest.number + 1)
        publish_manifest(self.files, self.storage.storage_id, manifest)
        self.manifest = manifest
        for name in sorted(before - manifest.names()):
            failpoint("compact.before_remove")
            self.files.remove(name)

    def _token(self) -> str:
        return self.storage.disk.token()

    def _sweep(self) -> None:
        """Remove what crashes left: files without a manifest, manifests before the last, prefixes of ended runs."""
        for number in numbers(self.files):
            if number < self.manifest.number:
                self.files.remove(f"manifests/{number}.json")
        for name in CompactedRuns(self.storage).orphans():
            failpoint("compact.before_sweep")
            self.files.remove(name)
        live = tuple(prefix for prefix in self.manifest.live if self._is_marked(prefix.run_id, prefix.file.path))
        if live != self.manifest.live:
            self._publish(dataclasses.replace(self.manifest, live=live))

    def _is_marked(self, run_id: str, path: str) -> bool:
        place = self.storage.place(run_id)
        try:
            last = place.layout().checkpoint
            if last < 0:
                return False
            compact_live.sweep(place, place.layout())
            data = self.storage.disk.read(f"{place.directory}/{last}.checkpoint")
            return bool(compact_live.read_marker(place, last, data)["file"]["path"] == path)
        except FileNotFoundError:
            return False
        except CorruptJournalError as error:
            self.done.damaged.append((run_id, str(error)))
            return True

    # Ended runs

    def _move_ended(self) -> None:
        waiting: dict[str, list[_History]] = {}
        sizes: Counter[str] = Counter()
        for run_id in self._ended():
            history = self._final(run_id)
            if history is None:
                continue
            date = _date(history.events[0])
            waiting.setdefault(date, []).append(history)
            sizes[date] += len(history.events)
            # As much in memory as two batches, whatever the number of dates.
            while sizes.total() >= 2 * self.rules.batch_events or sizes[date] >= self.rules.batch_events:
                largest = sizes.most_common(1)[0][0]
                del sizes[largest]
                self._move(largest, waiting.pop(largest))
        for date, histories in sorted(waiting.items()):
            self._move(date, histories)

    def _ended(self) -> Iterator[str]:
        """Runs with a directory that are not in the index of unfinished ones; what is left of compacted ones goes."""
        unfinished = set(self.storage.unfinished())
        candidates = [run_id for run_id in self.storage.run_directories() if run_id not in unfinished]
        if self.rules.above_bytes is not None:
            self._is_full = sum(map(self._size, candidates)) > self.rules.above_bytes
        for run_id in candidates:
            if self.storage.is_retired(run_id) and self._is_left_over(run_id):
                continue
            yield run_id

    _is_full = False

    def _is_left_over(self, run_id: str) -> bool:
        try:
            CompactedRuns(self.storage).read(run_id)
        except RunNotFoundError:
            return False  # another id looks like it
        if self.manifest.number >= 0:
            self.storage.remove_directory(run_id)
            self.done.retired += 1
        return True

    def _size(self, run_id: str) -> int:
        directory = self.storage.place(run_id).directory
        total = 0
        with contextlib.suppress(FileNotFoundError):
            for name in self.storage.disk.listdir(directory):
                total += self.storage.disk.size(f"{directory}/{name}")
        return total

    def _read(self, run_id: str) -> _History | None:
        """An ended run that the rules take; None where it stays, goes on, is gone or damaged."""
        try:
            history = self.storage.read_run(run_id)
        except RunNotFoundError:
            return None
        except StorageError as error:
            self.done.damaged.append((run_id, str(error)))
            return None
        if not history.finished:
            return None
        end = history.events[-1]
        age_s = self.now - end.at
        taken = self._is_full or age_s >= self.rules.older_than_s or not self.rules.older_than_s
        self.done.young += not taken
        if not isinstance(end, (RunCompleted, RunCancelled)):
            least = self.rules.takes_failed_after_s()
            taken = isinstance(end, RunFailed) and least is not None and age_s >= least
        if not history.settled and history.lease not in {"", RETIRED, *self._dead_leases()}:
            taken = False  # somebody is taking it over
        self.done.kept += not taken
        return _History(run_id, history.events, history.epochs) if taken else None

    _dead: set[str] | None = None

    def _dead_leases(self) -> set[str]:
        if self._dead is None:
            self._dead = lease_states(self.storage, declare=False).dead
        return self._dead

    def _final(self, run_id: str) -> _History | None:
        if self._read(run_id) is None:
            return None
        try:
            failpoint("compact.before_claim")
            view = make_final(self.storage.place(run_id))
        except (FencedError, FileNotFoundError):
            return None  # resumed at this moment
        except StorageError as error:
            self.done.damaged.append((run_id, str(error)))
            return None
        if view is None:
            return None
        return _History(run_id, view.events, [epoch for epoch, _ in view.accepted.records])

    def _move(self, date: str, histories: Sequence[_History]) -> None:
        rows = Rows()
        for history in histories:
            rows.add(history)
        token = self._token()
        batch = write_batch(self.files, token, date, {name: rows.table(name) for name in TABLES})
        ids = write_ids(self.files, token, (id_entry(history.run_id, date) for history in histories))
        self._publish(
            dataclasses.replace(self.manifest, batches=(*self.manifest.batches, batch), ids=(*self.manifest.ids, ids))
        )
        for history in histories:
            failpoint("compact.before_retire")
            self.storage.remove_directory(history.run_id)
        self.done.runs += batch.runs
        self.done.events += batch.events
        self.done.files += len(batch.files)
        self.done.bytes += batch.bytes

    # Live runs

    def _long_live(self) -> Iterator[compact_live.Closed]:
        for run_id in self.storage.unfinished():
            if self._size(run_id) < self.rules.live_bytes:
                continue
            try:
                closed = compact_live.closed_epochs(self.storage.place(run_id), self.rules.live_bytes)
            except (RunNotFoundError, FileNotFoundError):
                continue
            except StorageError as error:
                self.done.damaged.append((run_id, str(error)))
                continue
            if closed is not None:
                yield closed

    def _move_closed(self) -> None:
        for closed in self._long_live():
            prefix = compact_live.write_closed(self.files, self._token(), closed)
            self._publish(dataclasses.replace(self.manifest, live=(*self.manifest.live, prefix)))
            with contextlib.suppress(FileNotFoundError):
                compact_live.mark(closed, prefix)
                self.done.live += 1
        live = tuple(prefix for prefix in self.manifest.live if self._is_marked(prefix.run_id, prefix.file.path))
        if live != self.manifest.live:
            self._publish(dataclasses.replace(self.manifest, live=live))

    # Retention

    def _expired(self) -> Iterator[tuple[Batch, set[str]]]:
        """Batches with runs that are kept no longer, and those."""
        cuts = {status: self.now - seconds for status, seconds in self.rules.retain_s.items()}
        compacted = CompactedRuns(self.storage)
        for batch in self.manifest.batches:
            if batch.oldest > max(cuts.values(), default=-1.0):
                continue
            file = next(file for file in batch.files if file.table == "runs")
            table = compacted.table(file, columns=["run_id", "status", "finished_at"])
            ended = pc.cast(table["finished_at"], pa.int64()).to_pylist()
            rows = zip(table["run_id"].to_pylist(), table["status"].to_pylist(), ended, strict=True)
            dropped = {run_id for run_id, status, at in rows if status in cuts and at / 1e6 <= cuts[status]}
            if dropped:
                yield batch, dropped

    def _forget(self) -> None:
        expired = list(self._expired()) if self.rules.retain_s else []
        if not expired:
            return
        entries: Counter[int] = Counter()
        for ids in self.manifest.ids:
            entries.update(decode_ids(ids, self.files))
        batches = {batch.token: batch for batch in self.manifest.batches}
        for batch, dropped in expired:
            self._remove_for_good(dropped)
            entries.subtract(id_entry(run_id, batch.date) for run_id in dropped)
            del batches[batch.token]
            if len(dropped) < batch.runs:
                kept = self._rewrite([batch], dropped)
                batches[kept.token] = kept
            self.done.dropped += len(dropped)
        left = list(entries.elements())
        ids_left = (write_ids(self.files, self._token(), left),) if left else ()
        failpoint("retain.before_publish")
        self._publish(dataclasses.replace(self.manifest, batches=tuple(batches.values()), ids=ids_left))

    def _remove_for_good(self, run_ids: Iterable[str]) -> None:
        """No directory of these runs comes back, not even after a power loss."""
        shards = set()
        for run_id in run_ids:
            directory = self.storage.place(run_id).directory
            shards.add(os.path.dirname(directory))
            if self.storage.disk.exists(directory):
                self.storage.remove_directory(run_id)
        for shard in sorted(shards):
            if self.storage.disk.exists(shard):
                self.storage.disk.sync_dir(shard)

    # Merging

    def _merge(self) -> None:
        while (batches := self._mergeable()) is not None:
            merged = self._rewrite(batches)
            gone = {batch.token for batch in batches}
            left = [batch for batch in self.manifest.batches if batch.token not in gone]
            failpoint("merge.before_publish")
            self._publish(dataclasses.replace(self.manifest, batches=(*left, merged)))
            self.done.merged += len(batches)
        while (lists := _full_class(self.manifest.ids, lambda ids: size_class(ids.count, _CLASS_IDS))) is not None:
            entries = [entry for ids in lists for entry in decode_ids(ids, self.files)]
            merged_ids = write_ids(self.files, self._token(), entries)
            kept = [ids for ids in self.manifest.ids if ids not in lists]
            self._publish(dataclasses.replace(self.manifest, ids=(*kept, merged_ids)))

    def _mergeable(self) -> list[Batch] | None:
        """Batches of one date that should become one."""
        today = dt.datetime.fromtimestamp(self.now, dt.UTC).date()
        dates: dict[str, list[Batch]] = {}
        for batch in self.manifest.batches:
            if batch.raw < FULL_BYTES:
                dates.setdefault(batch.date, []).append(batch)
        for date, batches in sorted(dates.items()):
            if len(batches) > 1 and (today - dt.date.fromisoformat(date)).days > _COLD_DAYS:
                return batches
            of_a_class = _full_class(batches, lambda batch: size_class(batch.raw, _CLASS_BYTES))
            if of_a_class is not None:
                return of_a_class
        return None

    def _rewrite(self, batches: Sequence[Batch], without: Iterable[str] = ()) -> Batch:
        """The rows of these batches, of one date, in a new one."""
        compacted = CompactedRuns(self.storage)
        absent = pa.array(sorted(without), pa.string())
        tables = {}
        for name in TABLES:
            parts = [compacted.table(file) for batch in batches for file in batch.files if file.table == name]
            table = pa.concat_tables(parts)
            if len(absent):
                table = take(table, pc.indices_nonzero(pc.invert(pc.is_in(table["run_id"], absent))))
            tables[name] = table
        return write_batch(self.files, self._token(), batches[0].date, tables)


def size_class(size: int, unit: int) -> int:
    """0 below one unit, 1 below four, 2 below sixteen, and so on."""
    number = 0
    while size >= unit:
        number, unit = number + 1, unit * _MERGED
    return number


def _full_class(items: Sequence[Item], size: Callable[[Item], int]) -> list[Item] | None:
    """All items of the smallest class that has as many as merge."""
    classes: dict[int, list[Item]] = {}
    for item in items:
        classes.setdefault(size(item), []).append(item)
    full = [number for number, members in classes.items() if len(members) >= _MERGED]
    return classes[min(full)] if full else None


def _date(created: Event) -> str:
    assert isinstance(created, RunCreated)
    return dt.datetime.fromtimestamp(created.at, dt.UTC).date().isoformat()
