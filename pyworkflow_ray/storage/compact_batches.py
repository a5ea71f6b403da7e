"""What every compaction does, whatever the storage: batches of runs, their merges, what is kept how long.

Base of `compact` (a directory) and `objects.compact` (a bucket), which know how runs are taken and how their sources
go; calls checkpoint, checkpoint_write, checkpoint_manifest, tables. Decision 11 has the reasons. Rules:

* What is written is new files and then one manifest, published by exclusive creation. Files that the manifest before
  named and the new one does not go after it is durable. What a crash leaves behind the next compaction removes.
* A run counts from the checkpoint once the manifest is durable; only then its sources go.

Faults: those of the store that it is given; a crash between any two calls, another compaction.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pyworkflow_ray.engine.events import Event, RunCancelled, RunCompleted, RunCreated, RunFailed
from pyworkflow_ray.errors import ConfigurationError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.checkpoint_ids import Checkpoints, decode_ids, id_entry
from pyworkflow_ray.storage.checkpoint_manifest import Batch, Manifest, publish_manifest
from pyworkflow_ray.storage.checkpoint_write import take, write_batch, write_ids
from pyworkflow_ray.storage.journal import RETIRED
from pyworkflow_ray.storage.lease import LeaseStates
from pyworkflow_ray.storage.storage import RunHistory
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
    earlier compaction had left the sources. waiting: runs in a bucket whose slots a later compaction will remove.
    damaged: runs that could not be read, with the error.
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
    waiting: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class History:
    run_id: str
    events: list[Event]
    epochs: list[int]


class Compacting(Protocol):
    """What is used of a storage."""

    @property
    def root(self) -> str: ...

    @property
    def storage_id(self) -> str: ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    def read_run(self, run_id: str) -> RunHistory: ...

    def lease_states(self, *, declare: bool) -> LeaseStates: ...


class Batches:
    """One compaction. `manifest` is the one that counts now. only_counts: nothing is written or removed."""

    def __init__(self, storage: Compacting, rules: Rules, now: float) -> None:
        self._store = storage
        self.rules = rules
        self.now = now
        self.done = Compaction()
        self.files = storage.checkpoints.files
        self.manifest = Manifest()
        self.only_counts = False

    # What each storage does in its own way

    def _token(self) -> str:
        """A name nobody else uses."""
        raise NotImplementedError

    def _ended(self) -> Iterator[str]:
        """Runs that may have ended and are not in a checkpoint."""
        raise NotImplementedError

    def _final(self, run_id: str) -> History | None:
        """A run that the rules take, with which nobody goes on; None where it stays, goes on, is gone or damaged."""
        raise NotImplementedError

    def _finals(self) -> Iterator[History]:
        for run_id in self._ended():
            history = self._final(run_id)
            if history is not None:
                yield history

    def _moved(self, histories: Sequence[History]) -> None:
        """The manifest holds these runs: their sources may go."""
        raise NotImplementedError

    def _remove_for_good(self, run_ids: Iterable[str]) -> set[str]:
        """Those of which no source is left, and none comes back."""
        raise NotImplementedError

    # The manifest

    def _publish(self, manifest: Manifest) -> None:
        """Make this the manifest that counts; then remove the files that only the one before named."""
        before = self.manifest.names()
        manifest = dataclasses.replace(manifest, number=self.manifest.number + 1)
        publish_manifest(self.files, self._store.storage_id, manifest)
        self.manifest = manifest
        for name in sorted(before - manifest.names()):
            failpoint("compact.before_remove")
            self.files.remove(name)

    # Ended runs

    def _move_ended(self) -> None:
        waiting: dict[str, list[History]] = {}
        sizes: Counter[str] = Counter()
        for history in self._finals():
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

    def _read(self, run_id: str) -> History | None:
        """An ended run that the rules take; None where it stays, goes on, is gone or damaged."""
        try:
            history = self._store.read_run(run_id)
        except RunNotFoundError:
            return None
        except StorageError as error:
            self.done.damaged.append((run_id, str(error)))
            return None
        return History(run_id, history.events, history.epochs) if history.finished and self._takes(history) else None

    def _takes(self, history: RunHistory) -> bool:
        """Whether the rules take a run that has ended."""
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
        return taken

    _is_full = False  # all ended runs together take more than `above_bytes`
    _dead: set[str] | None = None

    def _dead_leases(self) -> set[str]:
        if self._dead is None:
            self._dead = self._store.lease_states(declare=False).dead
        return self._dead

    def _move(self, date: str, histories: Sequence[History]) -> None:
        rows = Rows()
        for history in histories:
            rows.add(history)
        token = self._token()
        batch = write_batch(self.files, token, date, {name: rows.table(name) for name in TABLES})
        ids = write_ids(self.files, token, (id_entry(history.run_id, date) for history in histories))
        self._publish(
            dataclasses.replace(self.manifest, batches=(*self.manifest.batches, batch), ids=(*self.manifest.ids, ids))
        )
        self._moved(histories)
        self.done.runs += batch.runs
        self.done.events += batch.events
        self.done.files += len(batch.files)
        self.done.bytes += batch.bytes

    # Retention

    def _expired(self) -> Iterator[tuple[Batch, set[str]]]:
        """Batches with runs that are kept no longer, and those."""
        cuts = {status: self.now - seconds for status, seconds in self.rules.retain_s.items()}
        compacted = CompactedRuns(self._store)
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
        for batch, overdue in expired:
            dropped = self._remove_for_good(overdue)
            if not dropped:
                continue
            entries.subtract(id_entry(run_id, batch.date) for run_id in dropped)
            del batches[batch.token]
            if len(dropped) < batch.runs:
                kept = self._rewrite([batch], dropped)
                batches[kept.token] = kept
            self.done.dropped += len(dropped)
        if not self.done.dropped:
            return
        left = list(entries.elements())
        ids_left = (write_ids(self.files, self._token(), left),) if left else ()
        failpoint("retain.before_publish")
        self._publish(dataclasses.replace(self.manifest, batches=tuple(batches.values()), ids=ids_left))

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
        compacted = CompactedRuns(self._store)
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
