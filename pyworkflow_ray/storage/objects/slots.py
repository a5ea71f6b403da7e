"""A run's history as numbered objects ("slots"), and which of them count. Pure: bytes in, decisions out.

Called by `commit`, `journal` and `storage`; calls `record` and `epochs`. Rules:

* Slot n is created exclusively and never changed. One slot is one group commit: a nonce, a head, and events.
* A slot counts when all lower ones do. So what a reader has seen of a run is final, and needs no seal.
* An owner has at most `WINDOW` slots in flight from its lowest unacknowledged one on. Whoever takes over claims the
  first free slot m; of the owner before him only slots below m + WINDOW can still arrive, so the claim passes over
  them: the history goes on at `next`, and what lies between does not count, whenever it arrives.
* The first slot of epoch 0 after `run_created` makes its writer the owner of that epoch; he has only that one in flight
  until it is his.
* Each head names the check of the slot before it in the history. A slot that was swapped, dropped, repeated or brought
  from elsewhere, and every flipped bit, is damage; a cut object too, for objects appear whole.
* A run that was compacted goes by its slot 0 first, so whoever finds slot 0 after a look has seen all the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from pyworkflow_ray.engine.events import Event, RunCreated
from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage.epochs import Standing, standing
from pyworkflow_ray.storage.record import chain_start, decode_records, encode_record, event_place, parse_event

SLOT_FORMAT: Final = 1
WINDOW: Final = 16
_NONCE_BYTES: Final = 32
_HEAD: Final = b'{"slot":'

Kind = Literal["create", "claim", "data"]


class SlotHead(BaseModel):
    """First record of a slot. before: check of the slot before it in the history. next: where the history goes on."""

    format: int = SLOT_FORMAT
    storage_id: str
    run_id: str
    slot: int
    epoch: int
    lease: str
    kind: Kind
    before: int
    next: int


def run_prefix(run_id: str) -> str:
    """Where a run's slots lie. One digit of the id's SHA-256 spreads runs, so that they can be listed in parallel."""
    return f"runs/{hashlib.sha256(run_id.encode()).hexdigest()[0]}/{run_id}/"


def slot_key(run_id: str, slot: int) -> str:
    return f"{run_prefix(run_id)}{slot:010d}"


def encode_slot(head: SlotHead, nonce: str, bodies: Sequence[bytes]) -> tuple[bytes, int]:
    """The object of a slot, and its check for the head of the slot after it."""
    chain = chain_start(head.storage_id, head.run_id, f"slot {head.slot} {nonce}")
    lines = [nonce.encode(), b"\n"]
    for body in (_HEAD + to_json(head) + b"}", *bodies):
        line, chain = encode_record(body, chain)
        lines.append(line)
    return b"".join(lines), chain


def nonce_of(data: bytes) -> bytes:
    """What tells one writer's object from another's."""
    return data[: _NONCE_BYTES + 1]


@dataclass(slots=True)
class Slot:
    """One object, decoded and checked by itself."""

    head: SlotHead
    nonce: str
    bodies: list[bytes]
    chain: int


def decode_slot(data: bytes, storage_id: str, run_id: str, number: int) -> Slot:
    """What lies in slot `number`.

    Raises:
        CorruptJournalError: one bit of it is not as it was written, or it was written for another place.
        StorageError: a newer version wrote it.
    """
    where = f"run {run_id!r}, slot {number}"
    nonce = data[:_NONCE_BYTES].decode("ascii", "replace")
    if data[_NONCE_BYTES : _NONCE_BYTES + 1] != b"\n":
        raise CorruptJournalError(f"{where} does not begin with its writer's nonce")
    decoded = decode_records(data[_NONCE_BYTES + 1 :], chain_start(storage_id, run_id, f"slot {number} {nonce}"))
    if decoded.end != "clean" or not decoded.bodies or not decoded.bodies[0].startswith(_HEAD):
        raise CorruptJournalError(f"{where}: {decoded.detail or 'it does not begin with its own head'}")
    raw = from_json(decoded.bodies[0])["slot"]
    if isinstance(raw.get("format"), int) and raw["format"] > SLOT_FORMAT:
        raise StorageError(f"{where} has format {raw['format']}, newer than {SLOT_FORMAT}: upgrade pyworkflow-ray")
    head = SlotHead.model_validate(raw)
    if (head.storage_id, head.run_id, head.slot) != (storage_id, run_id, number):
        raise CorruptJournalError(f"{where} was written for slot {head.slot} of run {head.run_id!r}")
    return Slot(head, nonce, decoded.bodies[1:], decoded.chain)


@dataclass(slots=True)
class Walk:
    """The history in a set of slots, from 0 to the first that is free.

    records: (epoch, body) of each event. next_slot: the first free slot: where its owner writes next and a taker
    claims. owner: nonce of the owner of the newest epoch, "" while epoch 0 has none. chain: check of the last slot.
    origin: nonce of slot 0, which tells this run from a later one of the same id.
    """

    records: list[tuple[int, bytes]] = field(default_factory=list)
    next_slot: int = 0
    epoch: int = -1
    lease: str = ""
    owner: str = ""
    chain: int = 0
    origin: str = ""

    @property
    def last_seq(self) -> int:
        return len(self.records) - 1

    def add(self, slot: Slot) -> None:
        """Take in the slot `next_slot`.

        Raises:
            CorruptJournalError: it does not follow.
        """
        head = slot.head
        where = f"run {head.run_id!r}, slot {head.slot}"
        if head.before != self.chain:
            raise CorruptJournalError(f"{where} does not follow the slot before it")
        if head.kind == "create":
            fits = self.epoch == -1 and head.epoch == 0 and len(slot.bodies) == 1
        elif head.kind == "claim":
            fits = self.epoch >= 0 and head.epoch == self.epoch + 1 and head.next > head.slot and not slot.bodies
        else:
            fits = head.epoch == self.epoch and slot.nonce == (self.owner or slot.nonce)
        if not fits or (head.kind != "claim" and head.next != head.slot + 1):
            raise CorruptJournalError(f"{where}: a {head.kind} of epoch {head.epoch} stands in epoch {self.epoch}")
        for body in slot.bodies:
            if event_place(body) != (len(self.records), head.epoch):
                raise CorruptJournalError(f"{where}: event {len(self.records)} is missing, found {event_place(body)}")
            self.records.append((head.epoch, body))
        self.epoch, self.lease, self.chain = head.epoch, head.lease, slot.chain
        self.owner = "" if head.kind == "create" else slot.nonce
        self.origin = self.origin or slot.nonce
        self.next_slot = head.next

    def events(self, storage_id: str, run_id: str) -> list[Event]:
        """The events; raises as `parse_event`, and where the first is not this run's creation."""
        try:
            events = [parse_event(body) for _, body in self.records]
        except CorruptJournalError as error:
            raise CorruptJournalError(f"run {run_id!r}: {error}") from None
        except StorageError as error:
            raise StorageError(f"run {run_id!r}: {error}") from None
        first = events[0]
        if not isinstance(first, RunCreated) or (first.run_id, first.storage_id) != (run_id, storage_id):
            raise CorruptJournalError(f"run {run_id!r}: its first event is not its own run_created")
        return events

    def standing(self, events: Sequence[Event]) -> Standing:
        """Whether the history has ended, as the disk's journals do it."""
        return standing(zip((epoch for epoch, _ in self.records), events, strict=True))


def walk(objects: Mapping[int, bytes], storage_id: str, run_id: str) -> Walk:
    """The history in `objects` (slot number to content). What lies beyond the first free slot is ignored.

    Raises:
        CorruptJournalError, StorageError: as `decode_slot` and `Walk.add`.
    """
    result = Walk()
    while result.next_slot in objects:
        number = result.next_slot
        result.add(decode_slot(objects[number], storage_id, run_id, number))
    return result


def shows_loss(objects: Mapping[int, bytes], found: Walk, storage_id: str, run_id: str) -> bool:
    """Whether what lies beyond the first free slot proves that this slot was there: a claim, which is made at the first
    free slot, or a slot that is further than an owner's window.

    Raises:
        CorruptJournalError, StorageError: as `decode_slot`.
    """
    beyond = sorted(number for number in objects if number > found.next_slot)
    if beyond and beyond[-1] >= found.next_slot + WINDOW:
        return True
    return any(decode_slot(objects[number], storage_id, run_id, number).head.kind == "claim" for number in beyond)


def newest_head(objects: Mapping[int, bytes], storage_id: str, run_id: str) -> SlotHead:
    """The head with the newest epoch among the last `WINDOW` slots: no claim is further from the last slot than that,
    for what follows a claim without its epoch was in flight when it was made."""
    heads = [decode_slot(data, storage_id, run_id, number).head for number, data in objects.items()]
    return max(heads, key=lambda head: (head.epoch, head.slot))
