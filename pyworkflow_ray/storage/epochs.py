"""Which bytes of which epochs count. Pure: names and bytes in, decisions out.

Called by `journal` and `storage`; calls `record`. Rules:

* A run's directory holds `N.journal`, one an epoch, and folds `A-B.journal`: the sealed prefixes of epochs A to B in
  one file. Other names are ignored. An epoch inside a fold is read from the fold, and its own file ignored.
* *Newest* is the highest epoch that a file or a fold names; a number below it is never free again.
* The newest seal that is whole decides: of the epochs it names only the sealed prefix counts, byte for byte, and the
  first of these has the next seal down. Epochs above the newest seal are open: whole records count, a torn tail is
  what a crash left. An epoch without a seal (its owner died before it was written) holds no events.
* Everything else is damage, and refused: a gap between epochs, a prefix that is shorter than its seal or has another
  hash, a seq that is not dense, a record out of its place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from pyworkflow_ray.engine.events import TERMINAL, Event, RunActivated, RunCreated
from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage.record import (
    Decoded,
    Part,
    Seal,
    chain_start,
    decode_records,
    encode_record,
    event_place,
    parse_event,
    parse_head,
    parse_seal,
)

_NAME: Final = re.compile(r"(0|[1-9][0-9]*)(?:-([1-9][0-9]*))?\.journal")


def epoch_name(epoch: int) -> str:
    return f"{epoch}.journal"


def fold_name(first: int, last: int) -> str:
    return f"{first}-{last}.journal"


@dataclass(slots=True, frozen=True)
class Layout:
    """The files of one run, as one listing of its directory shows them."""

    epochs: frozenset[int]
    folds: frozenset[tuple[int, int]]

    @property
    def newest(self) -> int:
        """The highest number ever given that this listing shows; -1 where it shows none."""
        return max(max(self.epochs, default=-1), max((last for _, last in self.folds), default=-1))

    def overtakes(self, epoch: int) -> bool:
        """Whether another owner stands above `epoch`, or a fold covers it: its appends count no more."""
        return any(other > epoch for other in self.epochs) or any(last >= epoch for _, last in self.folds)

    def plain(self) -> list[int]:
        """Epochs that are read from a file of their own, ascending."""
        return sorted(epoch for epoch in self.epochs if not any(a <= epoch <= b for a, b in self.folds))

    def outer_folds(self) -> list[tuple[int, int]]:
        """Folds that lie in no other fold, ascending."""
        return sorted(fold for fold in self.folds if not any(_inside(fold, other) for other in self.folds))


def _inside(fold: tuple[int, int], other: tuple[int, int]) -> bool:
    return other != fold and other[0] <= fold[0] and fold[1] <= other[1]


def read_names(names: Iterable[str]) -> Layout:
    epochs, folds = set(), set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if match[2] is None:
            epochs.add(int(match[1]))
        elif int(match[1]) < int(match[2]):
            folds.add((int(match[1]), int(match[2])))
    return Layout(frozenset(epochs), frozenset(folds))


# What counts ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Accepted:
    """The history that a set of files holds.

    records: (epoch, body) of each event, in order; seq is the index. newest, lease: the newest epoch and whose it is.
    open_parts: the epochs that no seal covers yet, ascending, up to the newest: what the next owner must seal.
    torn: why the tail was cut, "" where nothing was. prefixes: what counts of each epoch's file. chain: of the newest
    epoch, after what counts of it.
    """

    records: list[tuple[int, bytes]] = field(default_factory=list)
    prefixes: dict[int, bytes] = field(default_factory=dict)
    open_parts: list[Part] = field(default_factory=list)
    newest: int = -1
    lease: str = ""
    torn: str = ""
    chain: int = 0

    @property
    def settled(self) -> bool:
        """Whether the newest epoch has its seal (epoch 0 needs none): no stale owner can add to this history."""
        return len(self.open_parts) == 1

    @property
    def last_seq(self) -> int:
        return len(self.records) - 1


@dataclass(slots=True)
class _Epoch:
    """One epoch's file, decoded as far as it counts."""

    decoded: Decoded
    lease: str
    seal: Seal | None
    events: list[bytes]


def assemble(files: Mapping[int, bytes], storage_id: str, run_id: str) -> Accepted:
    """The one history in `files` (epoch to content, all from 0 to the newest).

    Raises:
        CorruptJournalError: anything that neither a crash nor a stale owner can leave.
        StorageError: written by a newer version.
    """
    newest = max(files, default=-1)
    missing = [epoch for epoch in range(newest + 1) if epoch not in files]
    if missing or newest < 0:
        raise CorruptJournalError(f"run {run_id!r}: epoch {missing[0] if missing else 0} has no file")
    limits: dict[int, Part] = {}
    epochs: dict[int, _Epoch] = {}
    accepted = Accepted(newest=newest)
    for number in range(newest, -1, -1):
        epoch = _decode_epoch(number, files[number], limits.get(number), storage_id, run_id)
        epochs[number] = epoch
        if limits and number not in limits:
            raise CorruptJournalError(f"run {run_id!r}: no seal covers epoch {number}")
        if epoch.seal is not None:
            _apply_seal(epoch.seal, number, limits, run_id)
        if epoch.decoded.end == "torn" and number not in limits and not accepted.torn:
            accepted.torn = f"epoch {number}: {epoch.decoded.detail}"
    _number_events(accepted, epochs, limits, run_id)
    accepted.lease, accepted.chain = epochs[newest].lease, epochs[newest].decoded.chain
    for number in range(newest + 1):
        prefix = files[number][: epochs[number].decoded.length]
        accepted.prefixes[number] = prefix
        if number not in limits:
            last_seq = max((seq for seq, (where, _) in enumerate(accepted.records) if where <= number), default=-1)
            digest = hashlib.sha256(prefix).hexdigest()
            accepted.open_parts.append(Part(epoch=number, last_seq=last_seq, length=len(prefix), sha256=digest))
    return accepted


def _decode_epoch(number: int, data: bytes, part: Part | None, storage_id: str, run_id: str) -> _Epoch:
    where = f"run {run_id!r}, epoch {number}"
    if part is not None:
        if len(data) < part.length or hashlib.sha256(data[: part.length]).hexdigest() != part.sha256:
            raise CorruptJournalError(f"{where}: its first {part.length} bytes are not those that were sealed")
        data = data[: part.length]
    decoded = decode_records(data, chain_start(storage_id, run_id, number))
    if decoded.end == "damaged" or (decoded.end == "torn" and part is not None):
        raise CorruptJournalError(f"{where}: {decoded.detail}")
    bodies = decoded.bodies
    try:
        head = parse_head(bodies[0]) if bodies else None
        seal = parse_seal(bodies[1]) if number > 0 and len(bodies) > 1 else None
    except (ValidationError, ValueError, KeyError) as error:
        raise CorruptJournalError(f"{where}: head or seal can't be read: {error}") from None
    if head is None or (head.storage_id, head.run_id, head.epoch) != (storage_id, run_id, number):
        # Head (and of epoch 0 run_created) are there before the file gets its name: no crash leaves less.
        raise CorruptJournalError(f"{where}: the file does not begin with its own head")
    first_event = 1 if number == 0 else 2
    if (number == 0 and len(bodies) < 2) or (number > 0 and len(bodies) > 1 and seal is None):
        raise CorruptJournalError(f"{where}: its {'first event' if number == 0 else 'seal'} is missing")
    return _Epoch(decoded, head.lease, seal, bodies[first_event:])


def _apply_seal(seal: Seal, number: int, limits: dict[int, Part], run_id: str) -> None:
    covered = [part.epoch for part in seal.parts]
    if not covered or covered != list(range(covered[0], number)) or any(epoch in limits for epoch in covered):
        raise CorruptJournalError(f"run {run_id!r}, epoch {number}: its seal covers epochs {covered}")
    limits.update((part.epoch, part) for part in seal.parts)


def _number_events(accepted: Accepted, epochs: Mapping[int, _Epoch], limits: Mapping[int, Part], run_id: str) -> None:
    for number in sorted(epochs):
        for body in epochs[number].events:
            place = event_place(body)
            if place != (len(accepted.records), number):
                raise CorruptJournalError(
                    f"run {run_id!r}, epoch {number}: event {len(accepted.records)} is missing, found {place}"
                )
            accepted.records.append((number, body))
        if number in limits and limits[number].last_seq != accepted.last_seq:
            raise CorruptJournalError(
                f"run {run_id!r}, epoch {number}: sealed at event {limits[number].last_seq}, found {accepted.last_seq}"
            )


def parse_events(accepted: Accepted, storage_id: str, run_id: str) -> list[Event]:
    """The events themselves; raises as `parse_event` does, and where the first is not this run's creation."""
    try:
        events = [parse_event(body) for _, body in accepted.records]
    except CorruptJournalError as error:
        raise CorruptJournalError(f"run {run_id!r}: {error}") from None
    except StorageError as error:
        raise StorageError(f"run {run_id!r}: {error}") from None
    first = events[0]
    if not isinstance(first, RunCreated) or (first.run_id, first.storage_id) != (run_id, storage_id):
        raise CorruptJournalError(f"run {run_id!r}: its first event is not its own run_created")
    return events


# The run's end ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Standing:
    """Whether a history has ended, and from which epoch on it is (or was last) unfinished: its name in the index."""

    finished: bool
    since_epoch: int


def standing(events: Iterable[tuple[int, Event]]) -> Standing:
    """`events` with the epochs they stand in. A run that ended and was activated after it (resume) is unfinished."""
    finished, since = False, 0
    for epoch, event in events:
        if isinstance(event, TERMINAL):
            finished = True
        elif finished and isinstance(event, RunActivated):
            finished, since = False, epoch
    return Standing(finished, since)


# Folds ------------------------------------------------------------------------------------------------------------


class FoldHead(BaseModel):
    """First record of a fold; the prefixes follow it, raw, in order. sections: (epoch, length)."""

    first: int
    last: int
    sections: list[tuple[int, int]]
    sha256: str


def encode_fold(prefixes: Mapping[int, bytes], storage_id: str, run_id: str) -> bytes:
    """A fold of these sealed prefixes (consecutive epochs, two at least)."""
    first, last = min(prefixes), max(prefixes)
    content = b"".join(prefixes[epoch] for epoch in range(first, last + 1))
    head = FoldHead(
        first=first,
        last=last,
        sections=[(epoch, len(prefixes[epoch])) for epoch in range(first, last + 1)],
        sha256=hashlib.sha256(content).hexdigest(),
    )
    line, _ = encode_record(b'{"fold":%s}' % to_json(head), chain_start(storage_id, run_id, f"{first}-{last}"))
    return line + content


def decode_fold(first: int, last: int, data: bytes, storage_id: str, run_id: str) -> dict[int, bytes]:
    """The prefixes in a fold; CorruptJournalError where one bit of it is not as it was written."""
    where = f"run {run_id!r}, fold {first}-{last}"
    stop = data.find(b"\n") + 1
    decoded = decode_records(data[:stop], chain_start(storage_id, run_id, f"{first}-{last}"))
    if decoded.end != "clean" or len(decoded.bodies) != 1 or not decoded.bodies[0].startswith(b'{"fold":'):
        raise CorruptJournalError(f"{where}: {decoded.detail or 'the file does not begin with its own head'}")
    head = FoldHead.model_validate(from_json(decoded.bodies[0])["fold"])
    content = data[stop:]
    if (head.first, head.last) != (first, last) or hashlib.sha256(content).hexdigest() != head.sha256:
        raise CorruptJournalError(f"{where}: the content fails its check")
    prefixes, at = {}, 0
    for epoch, length in head.sections:
        prefixes[epoch] = content[at : at + length]
        at += length
    if sorted(prefixes) != list(range(first, last + 1)) or at != len(content):
        raise CorruptJournalError(f"{where}: its sections do not cover it")
    return prefixes


def fold_plan(layout: Layout, mine: int, limit: int) -> list[tuple[int, int]]:
    """Ranges that the owner of epoch `mine` should fold now, in order.

    More than `limit` files of single closed epochs become one fold; more than `limit` folds become one.
    """
    plan = []
    closed = [epoch for epoch in layout.plain() if epoch < mine]
    folds = layout.outer_folds()
    if len(closed) > limit and closed[-1] - closed[0] + 1 == len(closed):
        plan.append((closed[0], closed[-1]))
        folds = [*folds, plan[0]]
    if len(folds) > limit and len(folds) > 1:
        plan.append((folds[0][0], max(last for _, last in folds)))
    return plan
