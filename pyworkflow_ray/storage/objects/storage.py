"""A storage in a bucket: runs made, listed, read and handed to their owners. Serves the same port as a directory's.

Called through `storage.port` by api, runtime and CLI, in any process; calls `commit`, `journal`, `leases`, `probe`.
Its methods wait for the bucket and may be called from any thread. Layout below the URL:

    storage.json                     storage id and format
    active/RUN/EPOCH                 the index of unfinished runs: empty objects, as `index` has them on a disk
    runs/H/RUN/SLOT                  see `slots`
    leases/ID.json, clock            see `leases`
    blobs/HH/SHA256                  content-addressed bytes: code snapshots, large payloads
    breakers/NAME.json               kept states of circuit breakers
    codec.json                       what holds the storage to a codec, see `storage.codec_mark`
    checkpoints/                     compacted runs, as on a disk; see `storage.checkpoint`
    retiring/                        which compacted runs still have slots, see `retire`
    probe/                           what a probe that was killed has left

A slot's number must not be free again while a stale owner may write to it: only the slots of runs that a checkpoint
holds are removed, by the rules of `trust`. So slots are looked for first, and the checkpoints where there are none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.parse
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar

from pyworkflow_ray.engine.events import Event, RunCreated
from pyworkflow_ray.errors import (
    ConfigurationError,
    CorruptJournalError,
    RunExistsError,
    RunNotFoundError,
    StorageError,
)
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.storage.checked import decode_checked
from pyworkflow_ray.storage.checkpoint_ids import Checkpoints
from pyworkflow_ray.storage.codec_mark import MARK
from pyworkflow_ray.storage.lease import LeaseStates
from pyworkflow_ray.storage.objects import trust
from pyworkflow_ray.storage.objects.bucket import (
    SCHEMES,
    Bucket,
    BucketError,
    ObstoreBucket,
    bucket_failed,
    gather_all,
)
from pyworkflow_ray.storage.objects.commit import (
    Place,
    View,
    continue_first,
    create_once,
    read_owner,
    read_view,
    take_over,
)
from pyworkflow_ray.storage.objects.files import ObjectCheckpoints
from pyworkflow_ray.storage.objects.journal import ObjectJournal
from pyworkflow_ray.storage.objects.leases import ObjectLease, Registry, join_lease, lease_key, make_lease
from pyworkflow_ray.storage.objects.loop import current_loop
from pyworkflow_ray.storage.objects.probe import open_storage_object, probe
from pyworkflow_ray.storage.objects.slots import SlotHead, encode_slot, slot_key
from pyworkflow_ray.storage.record import event_body
from pyworkflow_ray.storage.storage import Owner, RunHistory

log = logging.getLogger("pyworkflow_ray.storage")

T = TypeVar("T")

_SHARDS: Final = "0123456789abcdef"


class ObjectStorage:
    """An open storage in a bucket.

    Attributes:
        root: its URL. storage_id: 32 hexadecimal digits, for the life of the storage. checkpoints: which runs are
            compacted.
    """

    at_once: Final = 32  # runs that are worth reading at the same time: a request is mostly waiting

    def __init__(self, bucket: Bucket, storage_id: str) -> None:
        self.root: Final = bucket.url
        self.storage_id: Final = storage_id
        self.bucket: Final = bucket
        self._checkpoints = ObjectCheckpoints(bucket, storage_id)
        self.checkpoints: Final[Checkpoints] = self._checkpoints
        self._compacted: object = None  # a CompactedRuns, once one is needed
        self._marked: bool | None = None
        self._registry = Registry(bucket, storage_id)
        self._known_blobs: set[str] = set()

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> ObjectStorage:
        """Open the storage at `url`, making it where it is missing and `create` is true; then the store is probed too.

        Raises:
            ConfigurationError: the URL is none of ours, obstore is missing, the store ignores conditions, or other
                objects lie there.
            StorageError: it can't be reached, holds no storage, or a newer version made it.
            CorruptJournalError: `storage.json` is damaged, or missing from a storage that holds runs.
        """
        return cls.over(open_bucket(checked_url(url)), create=create)

    @classmethod
    def over(cls, bucket: Bucket, *, create: bool = True) -> ObjectStorage:
        """As `open`, for a bucket that is open."""

        async def begin() -> str:
            if create:
                await probe(bucket)
            return await open_storage_object(bucket, create=create)

        return cls(bucket, current_loop().run(begin()))

    # Making runs

    def create_run(self, event: RunCreated, *, lease: str = "") -> None:
        """Make one run; raises as `storage.storage.Storage.create_run`."""
        if not self.create_runs([event], lease=lease)[0]:
            raise RunExistsError(f"run {event.run_id!r} exists in {self.root}", run_id=event.run_id)

    def create_runs(self, events: Sequence[RunCreated], *, lease: str = "") -> list[bool]:
        """Make many runs at the same time: for each, whether it was made (False: the id is taken).

        Raises:
            ConfigurationError: an id is no run id; nothing was written.
            StorageError: the store refused; whether a run exists is unknown, creating it again tells.
        """
        for event in events:
            check_run_id(event.run_id)
            if event.storage_id != self.storage_id or event.seq != 0:
                raise ConfigurationError(
                    f"run {event.run_id!r}: run_created has storage id {event.storage_id!r} and seq {event.seq}, "
                    f"needs {self.storage_id!r} and 0"
                )
        first_with = {event.run_id: number for number, event in reversed(list(enumerate(events)))}
        firsts = [event for number, event in enumerate(events) if first_with[event.run_id] == number]
        fresh = [event for event in firsts if not self._holds(event.run_id)]
        began = trust.now()
        made = self.wait(self._create(fresh, lease))
        # Again, if that look can't be trusted any more: the slots may have gone since.
        beside = {run_id for run_id in made if self._holds(run_id)}
        if beside and trust.is_trusted(began):  # else it stays, does not count, and a compaction removes it
            self.wait(self.bucket.delete_many([slot_key(run_id, 0) for run_id in beside]))
        made -= beside
        for run_id in {event.run_id for event in fresh} - made:  # our entry may have come after the winner's run's end
            try:
                self.unlist_finished(run_id)
            except (StorageError, RunNotFoundError) as error:
                log.info("run %s: %s", run_id, error)
        return [event.run_id in made and first_with[event.run_id] == number for number, event in enumerate(events)]

    async def _create(self, events: Sequence[RunCreated], lease: str) -> set[str]:
        try:
            # The index entry comes before the run: a run that exists is never left out of recovery.
            await gather_all(self.bucket.put(_entry(event.run_id, 0), b"") for event in events)
        except BucketError as error:
            raise bucket_failed("creating runs in", self.root, error, "Nothing was acknowledged; try again") from error
        mine = await gather_all(self._create_one(event, lease) for event in events)
        return {event.run_id for event, is_mine in zip(events, mine, strict=True) if is_mine}

    async def _create_one(self, event: RunCreated, lease: str) -> bool:
        head = SlotHead(
            storage_id=self.storage_id,
            run_id=event.run_id,
            slot=0,
            epoch=0,
            lease=lease,
            kind="create",
            before=0,
            next=1,
        )
        data, _ = encode_slot(head, self.bucket.token(), [event_body(event, 0)])
        return await create_once(self.bucket, slot_key(event.run_id, 0), data)

    # Reading runs

    def read_run(self, run_id: str) -> RunHistory:
        """The run's history, all of it final; raises as `storage.storage.Storage.read_run`."""
        try:
            view = self.read_slots(run_id)
        except (RunNotFoundError, CorruptJournalError):
            found = self._read_compacted(run_id)
            if found is None:
                raise
            return found
        return history_of(run_id, view)

    def read_slots(self, run_id: str) -> View:
        """The run as its slots have it, compacted or not; raises as `commit.read_view`."""
        return self.wait(read_view(self.place(run_id)))

    def is_retired(self, run_id: str) -> bool:
        """Whether a checkpoint holds the run, told from 48 bits of the id's hash: False is certain."""
        return bool(self.checkpoints.dates(check_run_id(run_id)))

    def _holds(self, run_id: str) -> bool:
        """Whether a checkpoint holds the run, as `ObjectCheckpoints.may_hold`."""
        return self._checkpoints.may_hold(run_id) and self._read_compacted(run_id) is not None

    def _read_compacted(self, run_id: str) -> RunHistory | None:
        if not self.is_retired(run_id):
            return None
        from pyworkflow_ray.storage.checkpoint import CheckpointChanged, CompactedRuns  # loads pyarrow: seldom needed

        while True:
            if not isinstance(self._compacted, CompactedRuns) or not self._compacted.current():
                self._compacted = CompactedRuns(self)
            try:
                return self._compacted.read(run_id)
            except RunNotFoundError:
                return None  # two ids look alike, or retention took it
            except CheckpointChanged:
                self._compacted = None

    def owner(self, run_id: str) -> Owner:
        """Who holds the run, from its last slots alone."""
        try:
            head = self.wait(read_owner(self.place(run_id)))
        except RunNotFoundError:
            found = self._read_compacted(run_id)
            if found is None:
                raise
            return Owner(found.epoch, found.lease)
        return Owner(head.epoch, head.lease)

    def list_run_ids(self, finished: bool | None = None) -> list[str]:
        """Ids of all runs, or only of finished or unfinished ones, sorted; as `storage.storage.Storage`."""
        if finished is False:
            return self.unfinished()
        ids = set(self.run_directories())
        if finished is True:
            ids -= set(self.unfinished())
        return sorted(ids.union(self._compacted_ids()))

    def run_directories(self) -> list[str]:
        """Ids of the runs that have slots, sorted: all but the compacted ones, and what is left of those."""
        return sorted({run_id for shard in self.wait(self._shards()) for run_id in shard if _is_run_id(run_id)})

    def _compacted_ids(self) -> Iterable[str]:
        if not self.checkpoints.manifest().batches:
            return ()
        from pyworkflow_ray.storage.checkpoint import with_compacted

        return with_compacted(self, lambda compacted: compacted.ids()).keys()

    async def _shards(self) -> Any:
        return await gather_all(self.bucket.list_prefixes(f"runs/{digit}/") for digit in _SHARDS)

    def unfinished(self) -> list[str]:
        """Ids of the runs in the index that exist, sorted."""
        return self.wait(self._unfinished())

    async def _unfinished(self) -> list[str]:
        parts = [entry.key.split("/") for entry in await self.bucket.listing("active/")]
        ids = sorted({part[1] for part in parts if len(part) == 3 and _is_run_id(part[1])})
        made = await gather_all(self.bucket.modified_at(slot_key(run_id, 0)) for run_id in ids)
        return [run_id for run_id, at in zip(ids, made, strict=True) if at is not None]

    # Owning runs

    def activate(
        self, run_id: str, lease: str, *, first: bool = False, after: int | None = None
    ) -> tuple[ObjectJournal, list[Event]]:
        """Become the owner of a run; arguments and errors as `storage.storage.Storage.activate`."""
        place, loop = self.place(run_id), current_loop()
        if not first and self._holds(run_id):
            raise RunNotFoundError(f"run {run_id!r} has ended and was compacted: it can't go on", run_id=run_id)
        owned = self.wait(continue_first(place, lease) if first else take_over(place, lease, after))
        stands = owned.view.standing
        entries = {0, stands.since_epoch}
        if stands.finished:  # it is resumed: unfinished again before its first new event can be acknowledged
            self.wait(self.bucket.put(_entry(run_id, owned.epoch), b""))
            entries.add(owned.epoch)

        def on_finish(epoch: int) -> None:
            gone = self._unlist(run_id, {entry for entry in entries if entry <= epoch})
            loop.call(loop.spawn, gone)

        return ObjectJournal(place, owned, lease, loop, on_finish), owned.view.events

    async def _unlist(self, run_id: str, entries: Iterable[int]) -> None:
        try:
            for entry in sorted(entries):
                await self.bucket.delete(_entry(run_id, entry))
        except BucketError as error:
            log.info("run %s has ended and is still listed as unfinished: %s", run_id, error)

    def unlist_finished(self, run_id: str) -> bool:
        """Take a run that has ended out of the index, as its journal's `finish` does; False where it has not ended."""
        history = self.read_run(run_id)
        if history.finished:
            self.wait(self._unlist_to(run_id, history.epoch))
        return history.finished

    async def _unlist_to(self, run_id: str, epoch: int) -> None:
        listed = await self.bucket.listing(f"active/{run_id}/")
        entries = [int(name) for name in (entry.key.rpartition("/")[2] for entry in listed) if name.isdigit()]
        await self._unlist(run_id, [entry for entry in entries if entry <= epoch])

    # Leases

    def join_lease(self, lease_id: str | None = None) -> ObjectLease:
        """Hold a new lease, or with `lease_id` one that others made; raises as `storage.lease.Lease.join`."""
        if lease_id is None:
            lease_id = self.wait(make_lease(self.bucket, self.storage_id))
        else:
            self.wait(join_lease(self.bucket, self.storage_id, lease_id))
        return ObjectLease(self.bucket, self.storage_id, lease_id, current_loop())

    def lease_states(self, *, declare: bool) -> LeaseStates:
        """How the leases stand. `declare` marks those dead that nobody renews, which takes up to ten seconds."""
        return self.wait(self._registry.states(declare=declare))

    def is_held(self, lease_id: str) -> bool | None:
        """Whether somebody renews the lease; None where that can't be told."""
        return self.wait(self._registry.is_held(lease_id)) if lease_id else None

    def lost_lease(self, lease_id: str, states: LeaseStates) -> str:
        """Why nobody can tell whether the lease's holders live; "" where one can."""
        if lease_id in states.damaged:
            return states.damaged[lease_id]
        key = lease_key(lease_id)
        # Not in the listing: made after it, or lost. A lease has its object for as long as a run names it.
        if lease_id in states.living or self.wait(self.bucket.modified_at(key)) is not None:
            return ""
        return f"{self.root}/{key} is missing, so nothing proves that the run's owner is gone: restore it"

    # Blobs

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256, which is returned; storing them again costs a look."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._known_blobs:
            self.wait(self._put_blob(_blob(digest), data))
            self._known_blobs.add(digest)
        return digest

    async def _put_blob(self, key: str, data: bytes) -> None:
        found = await self.bucket.get(key) if await self.bucket.modified_at(key) is not None else None
        if found is None or found.data != data:  # replaces a damaged one
            await self.bucket.put(key, data)

    def get_blob(self, digest: str) -> bytes:
        """The bytes stored under `digest`; raises as `storage.storage.Storage.get_blob`."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise StorageError(f"{digest!r} names no blob: 64 hexadecimal digits do", path=self.root)
        path = f"{self.root}/{_blob(digest)}"
        found = self.wait(self.bucket.get(_blob(digest)))
        if found is None:
            raise StorageError(f"reading {path} failed: there is no such object", path=path)
        if hashlib.sha256(found.data).hexdigest() != digest:
            raise CorruptJournalError(f"{path} is damaged: its content has another hash than its name", path=path)
        return found.data

    # The mark of a codec

    def is_marked(self) -> bool:
        """Whether there is one. Once a storage without it holds runs it never gets one, so that is looked at once."""
        if self._marked is None:
            found = self.wait(self.bucket.get(MARK)) is not None
            if not found and not self.wait(self.bucket.peek("runs/")):
                return False
            self._marked = found
        return self._marked

    def read_mark(self) -> dict[str, Any]:
        """The content of the mark; FileNotFoundError where there is none. Raises as `checked.decode_checked`."""
        found = self.wait(self.bucket.get(MARK))
        if found is None:
            raise FileNotFoundError(MARK)
        return decode_checked(MARK, found.data, f"{self.root}/{MARK}")

    def write_mark(self, data: bytes, *, exclusive: bool) -> None:
        """Make the mark, or replace it; where another's is there `exclusive` leaves that."""
        if exclusive:
            self.wait(create_once(self.bucket, MARK, data))
        else:
            self.wait(self.bucket.put(MARK, data))

    # Inside

    def place(self, run_id: str) -> Place:
        """Where the run's slots lie."""
        check_run_id(run_id)
        return Place(self.bucket, self.storage_id, run_id)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; StorageError where the store refuses."""
        try:
            return current_loop().run(work)
        except BucketError as error:
            raise bucket_failed("the object store at", self.root, error) from error


def history_of(run_id: str, view: View) -> RunHistory:
    """A reading of slots as every storage gives it."""
    return RunHistory(
        run_id=run_id,
        events=view.events,
        epochs=[epoch for epoch, _ in view.walk.records],
        epoch=view.walk.epoch,
        lease=view.walk.lease,
        torn=False,
        detail="",
        finished=view.standing.finished,
        settled=True,
    )


def _entry(run_id: str, epoch: int) -> str:
    return f"active/{run_id}/{epoch}"


def _blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _is_run_id(name: str) -> bool:
    try:
        check_run_id(name)
    except ConfigurationError:
        return False
    return True


def checked_url(url: str) -> str:
    """`url` as it names a storage here: scheme, bucket, prefix, nothing else.

    Raises:
        ConfigurationError: it is no such URL, or carries what belongs into the environment.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ConfigurationError(
            f"storage={url!r}: object stores are given as {', '.join(f'{one}://bucket/prefix' for one in SCHEMES)}"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigurationError(
            f"storage={parts.scheme}://...: credentials and options go into environment variables, not into the URL: "
            "it stands in logs and messages"
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


# One a process and URL: connections and threads are shared. A forked child has neither.
_buckets: dict[tuple[int, str], ObstoreBucket] = {}


def open_bucket(url: str) -> ObstoreBucket:
    """The bucket at a checked URL."""
    key = (os.getpid(), url)
    found = _buckets.get(key)
    if found is None:
        found = _buckets[key] = ObstoreBucket.open(url)
    return found
