"""Creating a slot whatever the store answers, reading a run, and taking it over.

Called by `journal`, `storage` and `leases`; calls `slots` (pure) and the bucket. The protocol, with its proofs in
tests/property/test_slot_model.py:

* A slot is ours if the store says so, or if what lies there begins with our nonce. After any error the slot is read:
  the error proves nothing. Where nothing lies there the same bytes are written again, for the first try may still come.
* Take over: read up to the first free slot, claim it. The claim is exclusive, so all that was read is final then.
* A claim under the lease `RETIRED` is a compaction's, and the last: it says that the history, which has ended, moves
  into a checkpoint. Its slots go later, slot 0 first; `trust` says how stale owners and takers notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import CorruptJournalError, FencedError, RunNotFoundError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.epochs import Standing
from pyworkflow_ray.storage.journal import RETIRED
from pyworkflow_ray.storage.objects import trust
from pyworkflow_ray.storage.objects.bucket import Bucket, BucketError, bucket_failed
from pyworkflow_ray.storage.objects.slots import (
    WINDOW,
    SlotHead,
    Walk,
    encode_slot,
    newest_head,
    nonce_of,
    run_prefix,
    shows_loss,
    slot_key,
    walk,
)

TRIES: Final = 8  # about 20 s of pauses, and up to 10 s for each answer that does not come
_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 5.0
_READ_TRIES: Final = 100


@dataclass(slots=True, frozen=True)
class Place:
    """Where one run's slots lie, and whose they are."""

    bucket: Bucket
    storage_id: str
    run_id: str
    tries: int = TRIES

    def key(self, slot: int) -> str:
        return slot_key(self.run_id, slot)

    def where(self, slot: int) -> str:
        return f"{self.bucket.url}/{self.key(slot)}"


@dataclass(slots=True)
class View:
    """One reading of a run."""

    walk: Walk
    events: list[Event]

    @property
    def standing(self) -> Standing:
        return self.walk.standing(self.events)


async def create_once(bucket: Bucket, key: str, data: bytes, tries: int = TRIES) -> bool:
    """Make the object unless another's is there: True where it is ours, False where another's is.

    Raises:
        StorageError: that can't be told; it may be ours later.
        CorruptJournalError: what lies there begins as ours does and goes on otherwise.
    """
    where = f"{bucket.url}/{key}"
    for tried in range(1, tries + 1):
        try:
            failpoint("slot.before_create")
            await bucket.create(key, data)
            failpoint("slot.after_create")
            return True
        except BucketError as error:
            refused = error
        try:
            found = await bucket.get(key)
        except BucketError as error:
            refused = error
        else:
            if found is not None:
                return _is_ours(found.data, data, where)
        if refused.hopeless or tried == tries:
            break
        await bucket.pause(min(_FIRST_PAUSE_S * 2 ** (tried - 1), _MAX_PAUSE_S))
    raise bucket_failed("writing", where, refused, "Whether it was written is unknown; nothing was acknowledged")


def _is_ours(found: bytes, data: bytes, where: str) -> bool:
    if nonce_of(found) != nonce_of(data):
        return False
    if found != data:
        raise CorruptJournalError(f"{where} holds other bytes than were written to it", path=where)
    return True


# Reading ----------------------------------------------------------------------------------------------------------


async def read_walk(place: Place) -> Walk:
    """The run's history as it is now, or none of it.

    Raises:
        RunNotFoundError: there is no such run.
        CorruptJournalError: a slot is damaged; `.path` names the run.
        StorageError: the store can't be read, or a newer version wrote it.
    """
    prefix = run_prefix(place.run_id)
    try:
        for _ in range(_READ_TRIES):
            entries = await place.bucket.listing(prefix)
            numbers = [int(name) for name in (entry.key[len(prefix) :] for entry in entries) if name.isdigit()]
            found = await place.bucket.get_many([place.key(number) for number in numbers])
            if None in found:
                continue  # it is being removed: what is left of it must not pass for a shorter history
            objects = {number: one.data for number, one in zip(numbers, found, strict=True) if one is not None}
            if 0 not in objects:
                break
            result = walk(objects, place.storage_id, place.run_id)
            if not shows_loss(objects, result, place.storage_id, place.run_id):
                return result
            if await place.bucket.get(place.key(result.next_slot)) is None:  # else it came while we listed
                raise CorruptJournalError(
                    f"run {place.run_id!r}: slot {result.next_slot} is missing, though later ones are there: restore it"
                )
    except BucketError as error:
        raise bucket_failed("reading", f"{place.bucket.url}/{prefix}", error) from error
    except CorruptJournalError as error:
        raise _damaged(place, error) from None
    if any(one is not None for one in found):
        raise _damaged(place, CorruptJournalError(f"run {place.run_id!r}: slot 0 is missing"))
    raise RunNotFoundError(f"no run {place.run_id!r} in {place.bucket.url}", run_id=place.run_id)


async def read_view(place: Place) -> View:
    """The run's history, with its events parsed; raises as `read_walk`."""
    found = await read_walk(place)
    try:
        return View(found, found.events(place.storage_id, place.run_id))
    except CorruptJournalError as error:
        raise _damaged(place, error) from None


async def read_owner(place: Place) -> SlotHead:
    """The newest head, from the last slots alone; raises as `read_walk`."""
    prefix = run_prefix(place.run_id)
    try:
        entries = await place.bucket.listing(prefix)
        numbers = sorted(int(name) for name in (entry.key[len(prefix) :] for entry in entries) if name.isdigit())
        last = [number for number in numbers if number > numbers[-1] - WINDOW]
        found = await place.bucket.get_many([place.key(number) for number in last])
    except BucketError as error:
        raise bucket_failed("reading", f"{place.bucket.url}/{prefix}", error) from error
    if 0 not in numbers or None in found:  # none, or what is left of one
        raise RunNotFoundError(f"no run {place.run_id!r} in {place.bucket.url}", run_id=place.run_id)
    try:
        objects = {number: one.data for number, one in zip(last, found, strict=True) if one is not None}
        return newest_head(objects, place.storage_id, place.run_id)
    except CorruptJournalError as error:
        raise _damaged(place, error) from None


def _damaged(place: Place, error: CorruptJournalError) -> CorruptJournalError:
    path = f"{place.bucket.url}/{run_prefix(place.run_id)}"
    return CorruptJournalError(f"{path}: {error}", path=path)


# Owning -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Owned:
    """What an owner begins with. first: epoch 0, in which his first slot alone shows whether it is his.

    seen: when all of the run's slots were there, as `trust` wants it.
    """

    view: View
    nonce: str
    epoch: int
    next_slot: int
    chain: int
    first: bool
    seen: trust.Moment | None = None


async def is_there(place: Place, origin: str) -> bool:
    """Whether the run that began with the nonce `origin` still has all its slots.

    Raises:
        BucketError: the store can't be read.
    """
    found = await place.bucket.get(place.key(0))
    return found is not None and nonce_of(found.data)[:-1] == origin.encode()


def compacted_away(place: Place) -> FencedError:
    return FencedError(
        f"run {place.run_id!r} has ended and was compacted since this owner last wrote: it can't go on",
        path=place.where(0),
    )


async def continue_first(place: Place, lease: str) -> Owned:
    """Epoch 0 for the one run actor it is handed to. Reads one slot: whether others were faster the next one tells."""
    try:
        found = await place.bucket.get(place.key(0))
    except BucketError as error:
        raise bucket_failed("reading", place.where(0), error) from error
    if found is None:
        raise RunNotFoundError(f"no run {place.run_id!r} in {place.bucket.url}", run_id=place.run_id)
    try:
        made = walk({0: found.data}, place.storage_id, place.run_id)
        view = View(made, made.events(place.storage_id, place.run_id))
    except CorruptJournalError as error:
        raise _damaged(place, error) from None
    if made.lease != lease:
        raise FencedError(
            f"run {place.run_id!r}: epoch 0 belongs to lease {made.lease!r}, not {lease!r}", path=place.where(0)
        )
    seen = trust.seen_at(found.modified_at)
    return Owned(view, place.bucket.token(), 0, made.next_slot, made.chain, True, seen)


async def take_over(
    place: Place, lease: str, after: int | None = None, known: tuple[trust.Moment, View] | None = None
) -> Owned:
    """Claim the next epoch (or exactly `after` + 1). known: a reading, and when it began.

    Raises:
        FencedError: another owner was faster, or a compaction.
        RunNotFoundError, CorruptJournalError, StorageError: as `read_view`, and where the claim can't be written.
    """
    nonce = place.bucket.token()
    before: int | None = after
    for _ in range(_READ_TRIES):
        # Damage is found before anything is written.
        seen, view = known if known is not None else (trust.now(), await read_view(place))
        at, known = view.walk, None
        if at.lease == RETIRED:
            raise compacted_away(place)
        if before is not None and at.epoch != before:
            raise FencedError(
                f"run {place.run_id!r}: its newest epoch is {at.epoch}, not {before}: another owner has it",
                path=place.where(at.next_slot),
            )
        before = at.epoch
        head = SlotHead(
            storage_id=place.storage_id,
            run_id=place.run_id,
            slot=at.next_slot,
            epoch=at.epoch + 1,
            lease=lease,
            kind="claim",
            before=at.chain,
            next=at.next_slot + WINDOW,
        )
        data, chain = encode_slot(head, nonce, ())
        if await create_once(place.bucket, place.key(head.slot), data, place.tries):
            if not trust.is_trusted(seen) and not await _is_still_there(place, at.origin):
                raise compacted_away(place)
            return Owned(view, nonce, head.epoch, head.next, chain, False, seen)
        # Another's slot: a claim (the next reading says so), or one more event of the owner before.
    raise StorageError(
        f"run {place.run_id!r}: its owner wrote during each of {_READ_TRIES} takings", path=place.where(0)
    )


async def _is_still_there(place: Place, origin: str) -> bool:
    try:
        return await is_there(place, origin)
    except BucketError as error:
        raise bucket_failed("reading", place.where(0), error) from error


async def make_final(place: Place, known: tuple[trust.Moment, View]) -> View:
    """Claim a run that has ended, as that reading says, for a compaction: its history, with which nobody goes on.

    Raises:
        FencedError: somebody was faster, to resume it. Others as `take_over`.
    """
    view = known[1]
    if view.walk.lease == RETIRED:
        return view
    return (await take_over(place, RETIRED, view.walk.epoch, known)).view
