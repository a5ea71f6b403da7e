"""Leases where there are no file locks: an object that its holders renew, and that one who proved them gone marks dead.

Called by `storage`; calls the bucket. Rules:

* Every holder looks at `leases/ID.json` every `RENEW_S`; who finds it as it was at its last look renews it. So one
  write a period keeps a lease that many processes hold, and it is renewed at most two periods after the last one.
* A lease is expired when it was not renewed for `EXPIRE_S`, by the store's clock alone: the time of its last write,
  and that of an object written to ask what time it is. Clocks of nodes are never compared.
* Renewing and marking dead are conditional on the e-tag: of the two one wins, and dead is for ever. A holder whose
  renewal finds it dead makes a new lease.
* A lease is no fence: a holder that was cut off for long may still act, and is stopped by the slots.

Faults: those of `bucket`; a holder that stands still beyond `EXPIRE_S` (it is taken for gone); clocks of the store's
own machines that differ (a lease may be taken for dead early, which the slots make harmless).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pyworkflow_ray.errors import CorruptJournalError, FencedError, StorageError
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.lease import LeaseStates
from pyworkflow_ray.storage.objects.bucket import Bucket, BucketError, ConditionFailed, Entry, bucket_failed
from pyworkflow_ray.storage.objects.commit import create_once
from pyworkflow_ray.storage.objects.probe import CLOCK

log = logging.getLogger("pyworkflow_ray.storage")

RENEW_S: Final = 2.5
EXPIRE_S: Final = 10.0
_LOOK_S: Final = 0.5  # how often one looks who waits for a lease to be renewed or to expire
_SHOWN_S: Final = 5.0  # for showing only, where clocks are compared after all: they may differ by so much
_JOIN_TRIES: Final = 20
_DIRECTORY: Final = "leases/"


class Spawner(Protocol):
    """What is used of `loop.Loop`."""

    def call(self, function: Any, *args: Any) -> None: ...

    def spawn(self, work: Any) -> None: ...


def lease_key(lease_id: str) -> str:
    return f"{_DIRECTORY}{lease_id}.json"


def _encode(bucket: Bucket, storage_id: str, lease_id: str, state: str) -> bytes:
    """Every writing has bytes of its own: where e-tags are hashes, one that comes back must not look like the old."""
    content = {"lease": lease_id, "storage_id": storage_id, "state": state, "beat": bucket.token()}
    return encode_checked(lease_key(lease_id), content)


def _is_dead(bucket: Bucket, lease_id: str, data: bytes) -> bool:
    key = lease_key(lease_id)
    return bool(decode_checked(key, data, f"{bucket.url}/{key}")["state"] == "dead")


async def make_lease(bucket: Bucket, storage_id: str) -> str:
    lease_id = new_id()
    await create_once(bucket, lease_key(lease_id), _encode(bucket, storage_id, lease_id, "living"))
    return lease_id


async def join_lease(bucket: Bucket, storage_id: str, lease_id: str) -> None:
    """Renew a lease that others made: from now on it lives for `EXPIRE_S`.

    Raises:
        FencedError: it is dead, or was never made.
        StorageError: the store can't be read or written.
    """
    where = f"{bucket.url}/{lease_key(lease_id)}"
    failed: BucketError | None = None
    for _ in range(_JOIN_TRIES):
        try:
            found = await bucket.get(lease_key(lease_id))
            if found is None:
                raise FencedError(f"lease {lease_id!r} does not exist in {bucket.url}: make a new one", path=where)
            if _is_dead(bucket, lease_id, found.data):
                raise FencedError(f"lease {lease_id} is dead, its runs may be another's: make a new one", path=where)
            await bucket.replace(lease_key(lease_id), _encode(bucket, storage_id, lease_id, "living"), found.e_tag)
            return
        except ConditionFailed:
            continue  # somebody renewed it, or marked it: look again
        except BucketError as error:
            failed = error
            if error.hopeless:
                break
        await bucket.pause(0.1)
    raise bucket_failed("joining lease", where, failed or BucketError("it changed at every try"))


async def store_time(bucket: Bucket) -> float:
    """The time by the store's clock."""
    await bucket.put(CLOCK, bucket.token().encode())
    now = await bucket.modified_at(CLOCK)
    if now is None:
        raise BucketError("an object that was written is not there")
    return now


class Renewer:
    """Renews one lease for one process, for as long as somebody here holds it."""

    def __init__(self, bucket: Bucket, storage_id: str, lease_id: str) -> None:
        self.lease_id: Final = lease_id
        self.holders = 0
        self.dead = False
        self._bucket = bucket
        self._storage_id = storage_id
        self._seen = ""

    async def run(self) -> None:
        while self.holders > 0 and not self.dead:
            await self._bucket.pause(RENEW_S)
            if self.holders > 0:
                await self.beat()

    async def beat(self) -> None:
        """Look, and renew what nobody else has renewed since the last look."""
        key = lease_key(self.lease_id)
        try:
            found = await self._bucket.get(key)
            if found is None or _is_dead(self._bucket, self.lease_id, found.data):
                self.dead = True
                log.warning("lease %s was taken for dead: its runs may be another's now", self.lease_id)
            elif found.e_tag != self._seen:
                self._seen = found.e_tag
            else:
                data = _encode(self._bucket, self._storage_id, self.lease_id, "living")
                self._seen = await self._bucket.replace(key, data, found.e_tag)
        except ConditionFailed:
            pass  # another holder was faster, or a taker: the next look tells
        except (BucketError, CorruptJournalError) as error:
            log.info("lease %s could not be renewed: %s", self.lease_id, error)


_renewers: dict[tuple[str, str], Renewer] = {}
_renewers_lock = threading.Lock()


class ObjectLease:
    """A hold on one lease, for as long as this object is open or its process lives."""

    def __init__(self, bucket: Bucket, storage_id: str, lease_id: str, loop: Spawner) -> None:
        self.id: Final = lease_id
        self._open = True
        with _renewers_lock:
            key = (bucket.url, lease_id)
            renewer = _renewers.get(key)
            if renewer is None or renewer.holders == 0 or renewer.dead:
                renewer = _renewers[key] = Renewer(bucket, storage_id, lease_id)
                renewer.holders = 1
                loop.call(lambda: loop.spawn(renewer.run()))
            else:
                renewer.holders += 1
            self._renewer = renewer

    def close(self) -> None:
        """Let go. The lease lives on while others hold it, and for `EXPIRE_S`."""
        with _renewers_lock:
            if self._open:
                self._open = False
                self._renewer.holders -= 1

    def __enter__(self) -> ObjectLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _held_here(bucket: Bucket, lease_id: str) -> bool:
    with _renewers_lock:
        renewer = _renewers.get((bucket.url, lease_id))
        return renewer is not None and renewer.holders > 0 and not renewer.dead


# Death ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class _Look:
    entry: Entry
    e_tag: str


class Registry:
    """All leases of a storage, as others see them. Remembers the dead, which stay so."""

    def __init__(self, bucket: Bucket, storage_id: str) -> None:
        self._bucket = bucket
        self._storage_id = storage_id
        self._dead: set[str] = set()

    async def states(self, *, declare: bool) -> LeaseStates:
        """How the leases stand; `declare` marks those dead that are expired, waiting where that is not clear yet: until
        they are renewed or `EXPIRE_S` are over.

        Raises:
            StorageError: the store can't be read, or a mark can't be written.
        """
        states = LeaseStates()
        try:
            looks = await self._read(await self._bucket.listing(_DIRECTORY), states)
            if declare:
                await self._declare(looks, states)
        except BucketError as error:
            raise bucket_failed("looking at leases in", f"{self._bucket.url}/{_DIRECTORY}", error) from error
        return states

    async def _read(self, entries: Iterable[Entry], states: LeaseStates) -> dict[str, _Look]:
        """Those that live by their content, which are put among the living; the others go where they belong."""
        by_id = {_id_of(entry.key): entry for entry in entries if _id_of(entry.key)}
        unknown = sorted(by_id.keys() - self._dead)
        states.dead |= by_id.keys() & self._dead
        looks = {}
        found = await self._bucket.get_many([lease_key(lease_id) for lease_id in unknown])
        for lease_id, one in zip(unknown, found, strict=True):
            try:
                if one is not None and _is_dead(self._bucket, lease_id, one.data):
                    self._bury(lease_id, states)
                elif one is not None:
                    states.living.add(lease_id)
                    looks[lease_id] = _Look(by_id[lease_id], one.e_tag)
            except CorruptJournalError as error:
                states.damaged[lease_id] = str(error)
        return looks

    async def _declare(self, looks: dict[str, _Look], states: LeaseStates) -> None:
        doubtful = {lease_id: look for lease_id, look in looks.items() if not _held_here(self._bucket, lease_id)}
        while doubtful:
            now = await store_time(self._bucket)
            for lease_id, look in list(doubtful.items()):
                modified_at = await self._modified_at(lease_id)
                found = await self._bucket.get(lease_key(lease_id))
                if found is None or modified_at is None or found.e_tag != look.e_tag:
                    del doubtful[lease_id]  # renewed since our first look
                elif now - modified_at > EXPIRE_S:
                    del doubtful[lease_id]
                    if await self._mark(lease_id, found.e_tag):
                        self._bury(lease_id, states)
            if doubtful:
                await self._bucket.pause(_LOOK_S)

    async def _modified_at(self, lease_id: str) -> float | None:
        return await self._bucket.modified_at(lease_key(lease_id))

    async def _mark(self, lease_id: str, e_tag: str) -> bool:
        data = _encode(self._bucket, self._storage_id, lease_id, "dead")
        try:
            await self._bucket.replace(lease_key(lease_id), data, e_tag)
            return True
        except BucketError:  # proves nothing: what lies there does
            found = await self._bucket.get(lease_key(lease_id))
            return found is not None and _is_dead(self._bucket, lease_id, found.data)

    def _bury(self, lease_id: str, states: LeaseStates) -> None:
        self._dead.add(lease_id)
        states.living.discard(lease_id)
        states.dead.add(lease_id)

    async def is_held(self, lease_id: str) -> bool | None:
        """Whether somebody renews the lease; None where that can't be told. For showing: compares clocks."""
        if _held_here(self._bucket, lease_id):
            return True
        try:
            found = await self._bucket.get(lease_key(lease_id))
            modified_at = await self._modified_at(lease_id)
            if found is None or modified_at is None:
                return None
            if _is_dead(self._bucket, lease_id, found.data):
                return False
        except (BucketError, StorageError):
            return None
        return time.time() - modified_at < EXPIRE_S + _SHOWN_S


def _id_of(key: str) -> str:
    name = key.removeprefix(_DIRECTORY).removesuffix(".json")
    return name if lease_key(name) == key and "/" not in name else ""
