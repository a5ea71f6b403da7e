"""Compaction: runs that ended go to Parquet, so do closed epochs of long live ones; small batches merge; old runs go.

Called by `storage compact` and by the controller's upkeep, always in a process of its own: no run waits for it. Calls
compact_batches, compact_live, journal; for a bucket objects.compact. Decision 11 has the reasons. Rules:

* A run is written once it is final (`journal.make_final`), and counts from the checkpoint once the manifest is durable;
  only then its directory goes. Failed runs can be resumed: they stay until `failed_after_s` or their retention.
* Retention: a run's directory is gone, durably, before the manifest that forgets it, so that no journal comes back.

Faults: a crash between any two steps (failpoints), a full disk, another compaction, runs that are resumed, taken over,
folded and read meanwhile, damaged journals (reported, left alone) and damaged checkpoints (raised).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence

from pyworkflow_ray.errors import CorruptJournalError, FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage import compact_live
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.checkpoint_manifest import numbers
from pyworkflow_ray.storage.compact_batches import Batches, History
from pyworkflow_ray.storage.compact_batches import Compaction as Compaction
from pyworkflow_ray.storage.compact_batches import Rules as Rules
from pyworkflow_ray.storage.journal import disk_error, make_final
from pyworkflow_ray.storage.port import StoragePort
from pyworkflow_ray.storage.storage import Storage


def compact(
    storage: StoragePort, rules: Rules | None = None, *, now: float | None = None, dry_run: bool = False
) -> Compaction:
    """Move what `rules` name (default: all that completed or was cancelled) into Parquet, merge, and forget.

    Args:
        now: UNIX time that ages are counted from; default: the clock's. dry_run: only count; nothing is written.

    Raises:
        StorageError: another compaction is under way, or the disk refused; nothing is lost and calling again goes on.
        CorruptJournalError: the manifest or a checkpoint is damaged. Damaged journals are reported, not raised.
    """
    if not isinstance(storage, Storage):
        from pyworkflow_ray.storage.objects.compact import compact_bucket
        from pyworkflow_ray.storage.objects.storage import ObjectStorage

        assert isinstance(storage, ObjectStorage)
        return compact_bucket(storage, rules or Rules(), now=now, dry_run=dry_run)
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


class _Work(Batches):
    """One compaction of a directory."""

    def __init__(self, storage: Storage, rules: Rules, now: float) -> None:
        super().__init__(storage, rules, now)
        self.storage = storage

    def _token(self) -> str:
        return self.storage.disk.token()

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
        self.only_counts = True
        self.manifest = self.storage.checkpoints.manifest()
        for run_id in self._ended():
            history = self._read(run_id)
            if history is not None:
                self.done.runs += 1
                self.done.events += len(history.events)
        self.done.live = sum(1 for _ in self._long_live())
        self.done.dropped = sum(len(dropped) for _, dropped in self._expired())

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

    def _is_left_over(self, run_id: str) -> bool:
        try:
            CompactedRuns(self.storage).read(run_id)
        except RunNotFoundError:
            return False  # another id looks like it
        if self.manifest.number >= 0 and not self.only_counts:
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

    def _final(self, run_id: str) -> History | None:
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
        return History(run_id, view.events, [epoch for epoch, _ in view.accepted.records])

    def _moved(self, histories: Sequence[History]) -> None:
        for history in histories:
            failpoint("compact.before_retire")
            self.storage.remove_directory(history.run_id)

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

    def _remove_for_good(self, run_ids: Iterable[str]) -> set[str]:
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
        return set(run_ids)
