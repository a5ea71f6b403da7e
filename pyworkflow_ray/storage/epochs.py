"""Which bytes of which epochs count. Pure: names and bytes in, decisions out.

Called by `journal` and `storage`; calls `record`. Rules:

* A run's directory holds `N.journal`, one an epoch, and folds `A-B.journal`: the sealed prefixes of epochs A to B in
  one file. Other names are ignored. An epoch inside a fold is read from the fold, and its own file ignored.
* *Newest* is the highest epoch that a file or a fold names; a number below it is never free again.
* The newest seal that is whole decides: of the epochs it names only the sealed prefix counts, byte for byte, and the
  first of these has the next seal down. Epochs above the newest seal are open: whole records count, a torn tail is
  what a crash left. An epoch without a seal (its owner died before it was written) holds no events.
* `K.checkpoint` stands for the epochs 0 to K, which closed and whose events lie in a checkpoint (`compact_live`). Their
  numbers are taken, their files ignored, and the seal above must name what the checkpoint holds.
* Everything else is damage, and refused: a gap between epochs, a prefix that is shorter than its seal or has another
  hash, a seq that is not dense, a record out of its place.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

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
_MARKER: Final = re.compile(r"(0|[1-9][0-9]*)\.checkpoint")


def epoch_name(epoch: int) -> str:
    return f"{epoch}.journal"


def fold_name(first: int, last: int) -> str:
    return f"{first}-{last}.journal"


def marker_name(last: int) -> str:
    return f"{last}.checkpoint"


@dataclass(slots=True, frozen=True)
class Layout:
    """The files of one run, as one listing of its directory shows them.

    checkpoint: the epochs up to this one lie in a checkpoint; -1: none do.
    """

    epochs: frozenset[int]
    folds: frozenset[tuple[int, int]]
    checkpoint: int = -1

    @property
    def newest(self) -> int:
        """The highest number ever given that this listing shows; -1 where it shows none."""
        last_fold = max((last for _, last in self.folds), default=-1)
        return max(max(self.epochs, default=-1), last_fold, self.checkpoint)

    def overtakes(self, epoch: int) -> bool:
        """Whether another owner stands above `epoch`, or a fold covers it: its appends count no more."""
        folded = self.checkpoint >= epoch or any(last >= epoch for _, last in self.folds)
        return folded or any(other > epoch for other in self.epochs)

    def plain(self) -> list[int]:
        """Epochs that are read from a file of their own, ascending."""
        return sorted(
            epoch
            for epoch in self.epochs
            if epoch > self.checkpoint and not any(a <= epoch <= b for a, b in self.folds)
        )

    def outer_folds(self) -> list[tuple[int, int]]:
        """Folds that lie in no other fold and hold more than a checkpoint does, ascending."""
        folds = [fold for fold in self.folds if fold[1] > self.checkpoint]
        return sorted(fold for fold in folds if not any(_inside(fold, other) for other in folds))


def _inside(fold: tuple[int, int], other: tuple[int, int]) -> bool:
    return other != fold and other[0] <= fold[0] and fold[1] <= other[1]


def read_names(names: Iterable[str]) -> Layout:
    epochs, folds, checkpoint = set(), set(), -1
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            marker = _MARKER.fullmatch(name)
            checkpoint = max(checkpoint, int(marker[1]) if marker is not None else -1)
            continue
        if match[2] is None:
            epochs.add(int(match[1]))
        elif int(match[1]) < int(match[2]):
            folds.add((int(match[1]), int(match[2])))
    return Layout(frozenset(epochs), frozenset(folds), checkpoint)


# What counts ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Base:
    """The epochs 0 to `last` of a run, read from a checkpoint: what was sealed of each, and their events as records."""

    last: int
    parts: tuple[Part, ...]
    records: tuple[tuple[int, bytes], ...]


@dataclass(slots=True)
class Accepted:
    """The history that a set of files holds.

    records: (epoch, body) of each event, in order; seq is the index. newest, lease: the newest epoch and whose it is.
    open_parts: the epochs that no seal covers yet, ascending, up to the newest: what the next owner must seal.
    torn: why the tail was cut, "" where nothing was. prefixes: what counts of each epoch's file. chain: of the newest
    epoch, after what counts of it. sealed: what a whole seal, or a checkpoint, says of each epoch that it covers.
    """

    records: list[tuple[int, bytes]] = field(default_factory=list)
    prefixes: dict[int, bytes] = field(default_factory=dict)
    open_parts: list[Part] = field(default_factory=list)
    newest: int = -1
    lease: str = ""
    torn: str = ""
    chain: int = 0
    epochs: dict[int, _Epoch] = field(default_factory=dict)
    sealed: dict[int, Part] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        """Whether the newest epoch has its seal (epoch 0 needs none): no stale owner can add to this history."""
        return len(self.open_parts) == 1

    @property
    def last_seq(self) -> int:
        return len(self.records) - 1


@dataclass(slots=True)
class _Epoch:
    """One epoch's file, decoded as far as it counts: up to `part`, where a seal says so. places: (seq, epoch) each."""

    data: bytes
    part: Part | None
    decoded: Decoded
    lease: str
    seal: Seal | None
    events: list[bytes]
    places: list[tuple[int, int] | None]


def assemble(
    files: Mapping[int, bytes], storage_id: str, run_id: str, base: Base | None = None, known: Accepted | None = None
) -> Accepted:
    """The one history in `files` (epoch to content, all from 0, or the end of `base`, to the newest).

    Of `known`, an earlier history of the run, what lies in the same bytes is not decoded again.

    Raises:
        CorruptJournalError: anything that neither a crash nor a stale owner can leave.
        StorageError: written by a newer version.
    """
    newest = max(files, default=-1)
    first = base.last + 1 if base is not None else 0
    missing = [epoch for epoch in range(first, newest + 1) if epoch not in files]
    if missing or newest < first:
        raise CorruptJournalError(f"run {run_id!r}: epoch {missing[0] if missing else first} has no file")
    limits: dict[int, Part] = {}
    epochs: dict[int, _Epoch] = {}
    accepted = Accepted(newest=newest)
    for number in range(newest, first - 1, -1):
        before = known.epochs.get(number) if known is not None else None
        if before is not None and before.part == limits.get(number) and before.data == files[number]:
            epoch = before
        else:
            epoch = _decode_epoch(number, files[number], limits.get(number), storage_id, run_id)
        epochs[number] = epoch
        if limits and number not in limits:
            raise CorruptJournalError(f"run {run_id!r}: no seal covers epoch {number}")
        if epoch.seal is not None:
            _apply_seal(epoch.seal, number, limits, run_id)
        if epoch.decoded.end == "torn" and number not in limits and not accepted.torn:
            accepted.torn = f"epoch {number}: {epoch.decoded.detail}"
    if base is not None:
        _put_before(base, accepted, limits, run_id)
    _number_events(accepted, epochs, limits, run_id)
    accepted.sealed, accepted.epochs = limits, epochs
    accepted.lease, accepted.chain = epochs[newest].lease, epochs[newest].decoded.chain
    for number in range(first, newest + 1):
        prefix = files[number][: epochs[number].decoded.length]
        accepted.prefixes[number] = prefix
        if number not in limits:
            last_seq = max((seq for seq, (where, _) in enumerate(accepted.records) if where <= number), default=-1)
            digest = hashlib.sha256(prefix).hexdigest()
            accepted.open_parts.append(Part(epoch=number, last_seq=last_seq, length=len(prefix), sha256=digest))
    return accepted


def _put_before(base: Base, accepted: Accepted, limits: dict[int, Part], run_id: str) -> None:
    """Begin with what a checkpoint holds, which must be what the seals above it name."""
    if base.last not in limits:
        raise CorruptJournalError(f"run {run_id!r}: no seal covers epoch {base.last}, which lies in a checkpoint")
    for part in base.parts:
        if limits.setdefault(part.epoch, part) != part:
            raise CorruptJournalError(f"run {run_id!r}: the checkpoint of epoch {part.epoch} is not what was sealed")
    accepted.records.extend(base.records)
    places = [event_place(body) for _, body in base.records]
    if (
        places != [(seq, epoch) for seq, (epoch, _) in enumerate(base.records)]
        or [part.epoch for part in base.parts] != list(range(base.last + 1))
        or base.parts[-1].last_seq != accepted.last_seq
    ):
        raise CorruptJournalError(f"run {run_id!r}: events are missing from its checkpoint up to epoch {base.last}")


def _decode_epoch(number: int, data: bytes, part: Part | None, storage_id: str, run_id: str) -> _Epoch:
    where, name, whole = f"run {run_id!r}, epoch {number}", epoch_name(number), data
    if part is not None:
        if len(data) < part.length or hashlib.sha256(data[: part.length]).hexdigest() != part.sha256:
            raise CorruptJournalError(
                f"{where}: its first {part.length} bytes are not those that were sealed", path=name
            )
        data = data[: part.length]
    decoded = decode_records(data, chain_start(storage_id, run_id, number))
    if decoded.end == "damaged" or (decoded.end == "torn" and part is not None):
        raise CorruptJournalError(f"{where}: {decoded.detail}", path=name)
    bodies = decoded.bodies
    try:
        head = parse_head(bodies[0]) if bodies else None
        seal = parse_seal(bodies[1]) if number > 0 and len(bodies) > 1 else None
    except (ValidationError, ValueError, KeyError) as error:
        raise CorruptJournalError(f"{where}: head or seal can't be read: {error}", path=name) from None
    if head is None or (head.storage_id, head.run_id, head.epoch) != (storage_id, run_id, number):
        # Head (and of epoch 0 run_created) are there before the file gets its name: no crash leaves less.
        raise CorruptJournalError(f"{where}: the file does not begin with its own head", path=name)
    first_event = 1 if number == 0 else 2
    if (number == 0 and len(bodies) < 2) or (number > 0 and len(bodies) > 1 and seal is None):
        missing = "first event" if number == 0 else "seal"
        raise CorruptJournalError(f"{where}: its {missing} is missing", path=name)
    events = bodies[first_event:]
    return _Epoch(whole, part, decoded, head.lease, seal, events, [event_place(body) for body in events])


def _apply_seal(seal: Seal, number: int, limits: dict[int, Part], run_id: str) -> None:
    covered = [part.epoch for part in seal.parts]
    if not covered or covered != list(range(covered[0], number)) or any(epoch in limits for epoch in covered):
        raise CorruptJournalError(f"run {run_id!r}, epoch {number}: its seal covers epochs {covered}")
    limits.update((part.epoch, part) for part in seal.parts)


def _number_events(accepted: Accepted, epochs: Mapping[int, _Epoch], limits: Mapping[int, Part], run_id: str) -> None:
    for number in sorted(epochs):
        for place, body in zip(epochs[number].places, epochs[number].events, strict=True):
            if place != (len(accepted.records), number):
                raise CorruptJournalError(
                    f"run {run_id!r}, epoch {number}: event {len(accepted.records)} is missing, found {place}",
                    path=epoch_name(number),
                )
            accepted.records.append((number, body))
        if number in limits and limits[number].last_seq != accepted.last_seq:
            raise CorruptJournalError(
                f"run {run_id!r}, epoch {number}: sealed at event {limits[number].last_seq}, found {accepted.last_seq}",
                path=epoch_name(number),
            )


class Parsed(Protocol):
    """A history that was parsed before."""

    @property
    def accepted(self) -> Accepted: ...

    @property
    def events(self) -> list[Event]: ...


def parse_events(accepted: Accepted, storage_id: str, run_id: str, known: Parsed | None = None) -> list[Event]:
    """The events themselves; raises as `parse_event` does, and where the first is not this run's creation.

    What `accepted` begins with in common with `known` is not parsed again.
    """
    records = accepted.records
    events: list[Event] = []
    if known is not None:
        old = known.accepted.records
        same = len(old) if records[: len(old)] == old else 0
        events = known.events[:same]
    try:
        events += [parse_event(body) for _, body in records[len(events) :]]
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
    folds = [fold for fold in layout.outer_folds() if fold[0] > layout.checkpoint]
    if len(closed) > limit and closed[-1] - closed[0] + 1 == len(closed):
        plan.append((closed[0], closed[-1]))
        folds = [*folds, plan[0]]
    if len(folds) > limit and len(folds) > 1:
        plan.append((folds[0][0], max(last for _, last in folds)))
    return plan
