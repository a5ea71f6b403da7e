"""Compaction in a bucket: runs that ended go to Parquet there, batches merge, old runs go, slots are removed later.

Called through `storage.compact`; calls compact_batches, commit, retire. Decision 32 has the reasons. Rules:

* A run is claimed under the lease `RETIRED` before it is read for the checkpoint: its history is final from then on,
  whoever looks, and so the same for two compactions.
* Of two compactions that go on from one manifest one publishes the next; the other stops and has changed nothing that
  counts. There is no lock: a lock in a bucket would be one more thing that a stale holder believes in.
* A file that no manifest names is removed once it is older than any compaction may take from its first file to its
  manifest (`_PUBLISH_S`, which it checks before it publishes).
* Slots go by `retire`: later, and only after the checkpoint was read again. Retention forgets no run that has some.
* Live runs stay in their slots, whatever their length: a stale owner's number must not be free.

Faults: a crash between any two requests, ambiguous answers, other compactions at any moment, runs that are resumed
meanwhile, damaged slots (reported, left alone) and checkpoints (raised, or reported where slots are to go).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pyworkflow_ray.errors import FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.checkpoint import CompactedRuns
from pyworkflow_ray.storage.checkpoint_ids import days_of, decode_ids
from pyworkflow_ray.storage.checkpoint_manifest import MANIFESTS, Manifest, numbers
from pyworkflow_ray.storage.compact_batches import Batches, Compaction, History, Rules
from pyworkflow_ray.storage.journal import RETIRED
from pyworkflow_ray.storage.objects import retire, trust
from pyworkflow_ray.storage.objects.bucket import gather_all
from pyworkflow_ray.storage.objects.commit import make_final, read_view
from pyworkflow_ray.storage.objects.files import CHECKPOINTS
from pyworkflow_ray.storage.objects.retire import AT_ONCE, Going, Lists, Retirement, going
from pyworkflow_ray.storage.objects.slots import run_prefix
from pyworkflow_ray.storage.objects.storage import ObjectStorage, history_of

_PUBLISH_S: Final = 1800.0  # half of `GRACE_S`


def compact_bucket(
    storage: ObjectStorage,
    rules: Rules,
    *,
    now: float | None = None,
    dry_run: bool = False,
    grace_s: float = trust.GRACE_S,
) -> Compaction:
    """As `storage.compact.compact`. grace_s: for tests, which know that no owner is stale."""
    work = _BucketWork(storage, rules, time.time() if now is None else now, grace_s)
    if dry_run:
        work.count()
        return work.done
    try:
        work.all()
    except OSError as error:
        where = str(error.filename or storage.root)
        text = f"compacting {storage.root} failed: {error.strerror}. Nothing that counts was removed; call it again"
        raise StorageError(text, path=where) from error
    return work.done


class _BucketWork(Batches):
    """One compaction of a bucket."""

    def __init__(self, storage: ObjectStorage, rules: Rules, now: float, grace_s: float) -> None:
        super().__init__(storage, rules, now)
        self.storage = storage
        self._grace_s = grace_s
        self._writing: trust.Moment | None = None  # since the first file that no manifest names yet
        self._moving: list[Going] = []

    def all(self) -> None:
        self.manifest = self.storage.checkpoints.manifest()
        if self.manifest.number < 0:
            self._publish(self.manifest)
        self._lists = self.storage.wait(retire.read_lists_now(self.storage.bucket))
        self._sweep()
        self._move_ended()
        self._forget()
        self._merge()
        self._retire()

    def count(self) -> None:
        """What `all` would do, from reading alone."""
        self.only_counts = True
        self.manifest = self.storage.checkpoints.manifest()
        self._lists = self.storage.wait(retire.read_lists(self.storage.bucket))
        for run_id in self._ended():
            history = self._read(run_id)
            if history is not None:
                self.done.runs += 1
                self.done.events += len(history.events)
        self.done.waiting = sum(len(runs) for token, runs in self._lists.runs.items() if token not in self._lists.done)
        self.done.dropped = sum(len(dropped) for _, dropped in self._expired())

    # The manifest

    def _token(self) -> str:
        self._writing = self._writing or trust.now()
        return self.storage.bucket.token()

    def _publish(self, manifest: Manifest) -> None:
        if self._writing is not None and trust.age_s(self._writing) > _PUBLISH_S:
            text = f"compacting {self.storage.root} took too long: others may remove what it has written. Run it again"
            raise StorageError(text, path=self.files.path(""))
        failpoint("bucket.before_publish")
        super()._publish(manifest)
        self._writing = None

    def _sweep(self) -> None:
        """Remove what crashes left: manifests before the last, and files that no manifest names or will name."""
        bucket = self.storage.bucket
        entries = self.storage.wait(bucket.listing(CHECKPOINTS))
        for number in numbers(self.files):
            if number < self.manifest.number:
                self.files.remove(f"{MANIFESTS}/{number}.json")
        named = self.storage.checkpoints.manifest().names()
        for entry in entries:
            name = entry.key.removeprefix(CHECKPOINTS)
            is_file = name.startswith(("date=", "ids/"))
            if is_file and name not in named and self._lists.now - entry.modified_at >= self._grace_s:
                failpoint("bucket.before_sweep")
                self.files.remove(name)

    # Ended runs

    def _ended(self) -> Iterator[str]:
        """Runs with slots that are not in the index of unfinished ones, nor on a list of those that go."""
        found = self.storage.run_directories()  # before the index: a run that is made meanwhile is in neither
        unfinished = set(self.storage.unfinished())
        lists = [decode_ids(ids, self.files) for ids in self.manifest.ids]
        listed = [run_id for run_id in found if run_id not in self._lists.held]
        candidates = [run_id for run_id in listed if run_id not in unfinished or days_of(lists, run_id)]
        if self.rules.above_bytes is not None:
            self._is_full = self._bytes(set(candidates)) > self.rules.above_bytes
        left_over = []
        for run_id in candidates:
            if days_of(lists, run_id) and self._is_compacted(run_id):
                left_over.append(run_id)
            else:
                yield run_id
        self._note_left_over(left_over)

    def _bytes(self, run_ids: set[str]) -> int:
        shards = [self.storage.bucket.listing(f"runs/{digit}/") for digit in "0123456789abcdef"]
        entries = itertools.chain.from_iterable(self.storage.wait(gather_all(shards)))
        return sum(entry.size for entry in entries if entry.key.split("/")[2] in run_ids)

    def _is_compacted(self, run_id: str) -> bool:
        try:
            CompactedRuns(self.storage).read(run_id)
        except RunNotFoundError:
            return False  # another id looks like it
        return True

    def _note_left_over(self, run_ids: Sequence[str]) -> None:
        """Slots of runs that an earlier compaction moved and did not put on a list, or that came late."""
        notes = []
        for run_id in run_ids:
            kept = CompactedRuns(self.storage).read(run_id)
            note = going(run_id, kept.events, kept.epochs)
            try:
                slots = history_of(run_id, self.storage.read_slots(run_id))
                is_same = slots.events[0] == kept.events[0]
                if is_same and going(run_id, slots.events, slots.epochs) != note:
                    text = f"run {run_id!r} has other slots than events in its checkpoint: they were left alone"
                    self.done.damaged.append((run_id, text))
                    continue
            except StorageError:
                pass  # slot 0 is gone, or never was: they do not count, as little as a run made beside a compacted one
            notes.append(note)
        if notes and self.manifest.number >= 0 and not self.only_counts:
            self.storage.wait(retire.note(self.storage.bucket, self.storage.storage_id, notes))
            self.done.retired += len(notes)

    def _finals(self) -> Iterator[History]:
        ended = self._ended()
        while chunk := list(itertools.islice(ended, AT_ONCE)):
            for history in self.storage.wait(gather_all(self._make_final(run_id) for run_id in chunk)):
                if history is not None:
                    yield history

    async def _make_final(self, run_id: str) -> History | None:
        place, seen = self.storage.place(run_id), trust.now()
        try:
            view = await read_view(place)
            history = history_of(run_id, view)
            if not history.finished or not (self._takes(history) or history.lease == RETIRED):
                return None
            failpoint("bucket.before_claim")
            view = await make_final(place, (seen, view))
        except (FencedError, RunNotFoundError):
            return None  # resumed at this moment, or moved by another compaction
        except StorageError as error:
            self.done.damaged.append((run_id, str(error)))
            return None
        return History(run_id, view.events, [epoch for epoch, _ in view.walk.records])

    def _moved(self, histories: Sequence[History]) -> None:
        notes = [going(history.run_id, history.events, history.epochs) for history in histories]
        failpoint("bucket.before_note")
        self.storage.wait(retire.note(self.storage.bucket, self.storage.storage_id, notes))
        self._moving += notes

    # What goes

    def _retire(self) -> None:
        bucket = self.storage.bucket
        lists = self.storage.wait(retire.read_lists_now(bucket))
        retirement = Retirement(bucket, CompactedRuns(self.storage), lists, self._grace_s)
        for token in retirement.due():
            proved = retirement.proved(token)
            failpoint("bucket.before_remove")
            self.storage.wait(retirement.remove(token, proved))
        self.storage.wait(retirement.tidy())
        self.done.waiting = retirement.waiting
        self.done.damaged += retirement.damaged

    def _remove_for_good(self, run_ids: Iterable[str]) -> set[str]:
        held = self._lists.held.union(going.run_id for going in self._moving)
        free = sorted(run_id for run_id in run_ids if run_id not in held)
        left = self.storage.wait(gather_all(self.storage.bucket.peek(run_prefix(run_id)) for run_id in free))
        return {run_id for run_id, keys in zip(free, left, strict=True) if not keys}

    _lists: Lists
