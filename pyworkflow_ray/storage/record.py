"""The record format of the journal. Pure: bytes in, bytes out.

Called by `epochs` and `journal`; calls the event models. Rules:

* A record is one line: `length chain check body`, the first three as eight hexadecimal digits each. `length` counts
  the bytes of the JSON body. `chain` is the CRC32 of the body seeded with the chain value of the record before.
  `check` is the CRC32 of the first 18 bytes, seeded alike: a damaged length is told from a torn record.
* The chain of a file starts from storage id, run id and place (the epoch, or a fold's range): a record or file that
  was swapped, dropped, repeated or brought from elsewhere breaks it.
* Bytes are compared, not meanings: an `A` for an `a` in a number is damage.
* A file that ends inside a record is *torn*: what a crash leaves, and never acknowledged. A complete record that does
  not fit is *damage*. A tail of NUL bytes (a file system that had made room but not yet written) counts as torn. The
  loss of whole records at the end can't be told from a crash by any such log.
* Bodies are `{"head":…}` (owner of the file), `{"seal":…}` (what counts of earlier epochs) or
  `{"seq":n,"epoch":n,["safe":true,]"event":{…}}`.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from pyworkflow_ray.engine.events import SCHEMA_VERSION, AnyEvent, Event, RunCreated, UnknownEvent, event_adapter
from pyworkflow_ray.errors import CorruptJournalError, PayloadError, StorageError

FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 27
_CHECKED_BYTES: Final = 18  # "length chain " of the header
_MAX_BODY_BYTES: Final = 0xFFFFFFFF
_ZERO_TAIL_BYTES: Final = 8  # fewer NULs than this are damage: one zeroed byte must not look like a crash

_EVENT = re.compile(rb'\{"seq":(0|[1-9][0-9]*),"epoch":(0|[1-9][0-9]*),("safe":true,)?"event":')
_KNOWN_TYPES: Final = frozenset(
    member.model_fields["type"].default for member in get_args(get_args(AnyEvent)[0]) if issubclass(member, BaseModel)
)


def chain_start(storage_id: str, run_id: str, place: int | str) -> int:
    """The value a file's chain begins with; `place` is the epoch, or the range of a fold ("0-63")."""
    return zlib.crc32(f"pyworkflow-ray {FORMAT_VERSION}\x1f{storage_id}\x1f{run_id}\x1f{place}".encode())


def encode_record(body: bytes, chain: int) -> tuple[bytes, int]:
    """`body` as a record that follows `chain`, and the chain after it.

    Raises:
        PayloadError: the body is 4 GiB or larger.
    """
    if len(body) > _MAX_BODY_BYTES:
        raise PayloadError(f"an event of {len(body)} bytes does not fit a record: spill its payloads")
    after = zlib.crc32(body, chain)
    front = b"%08x %08x " % (len(body), after)
    return b"%s%08x %s\n" % (front, zlib.crc32(front, chain), body), after


@dataclass(slots=True)
class Decoded:
    """What the front of some bytes holds: every record up to the first that does not count.

    length: bytes those records take; chain: its value after them.
    end: "clean" (nothing follows), "torn" or "damaged"; `detail` says why.
    """

    bodies: list[bytes] = field(default_factory=list)
    length: int = 0
    chain: int = 0
    end: Literal["clean", "torn", "damaged"] = "clean"
    detail: str = ""


def decode_records(data: bytes, chain: int) -> Decoded:
    """All records from the start of `data` for as long as they are whole and follow `chain`. Never raises."""
    result = Decoded(chain=chain)
    stripped = len(data.rstrip(b"\0"))
    zeros = len(data) - stripped
    limit = stripped if zeros >= _ZERO_TAIL_BYTES else len(data)
    at = 0
    while at < limit:
        if limit - at < HEADER_BYTES:
            return _ended(result, "torn", f"{limit - at} bytes of a record's header at byte {at}")
        front = data[at : at + _CHECKED_BYTES]
        check = b"%08x " % zlib.crc32(front, chain)
        if data[at + _CHECKED_BYTES : at + HEADER_BYTES] != check:
            return _ended(result, "damaged", f"the header of the record at byte {at} does not follow the one before")
        length = int(front[:8], 16)
        start, stop = at + HEADER_BYTES, at + HEADER_BYTES + length
        if limit < stop + 1:
            return _ended(result, "torn", f"{limit - at} of {stop + 1 - at} bytes of the record at byte {at}")
        body = data[start:stop]
        after = zlib.crc32(body, chain)
        if front != b"%08x %08x " % (length, after) or data[stop] != 0x0A:
            return _ended(result, "damaged", f"the record at byte {at} fails its check")
        result.bodies.append(body)
        result.length = at = stop + 1
        result.chain = chain = after
    if zeros and limit == stripped:
        return _ended(result, "torn", f"{zeros} NUL bytes at byte {at}")
    return result


def _ended(result: Decoded, end: Literal["torn", "damaged"], detail: str) -> Decoded:
    result.end, result.detail = end, detail
    return result


# Events -----------------------------------------------------------------------------------------------------------


def event_body(event: Event, epoch: int) -> bytes:
    """The body of an event's record.

    Raises:
        PayloadError: a value inside the event has no JSON form; nothing was written.
    """
    try:
        text = to_json(event)
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        raise PayloadError(f"event {event.type!r} (seq {event.seq}) can't be written as JSON: {error}") from None
    return b'{"seq":%d,"epoch":%d,%s"event":%s}' % (event.seq, epoch, b'"safe":true,' if event.SAFE else b"", text)


def event_place(body: bytes) -> tuple[int, int] | None:
    """(seq, epoch) of an event's body, None where the body is no event."""
    match = _EVENT.match(body)
    return None if match is None else (int(match[1]), int(match[2]))


def parse_event(body: bytes) -> Event:
    """The event in a body that passed its check.

    Raises:
        StorageError: its type or schema is of a newer version, and it is not marked safe to ignore.
        CorruptJournalError: it is no event at all.
    """
    match = _EVENT.match(body)
    if match is None:
        raise CorruptJournalError(f"a record that is no event stands among the events: {body[:60]!r}")
    text = body[match.end() : -1]
    try:
        event = event_adapter.validate_json(text)
    except ValidationError as error:
        return _newer_event(text, safe=match[3] is not None, error=error)
    if event.seq != int(match[1]):
        raise CorruptJournalError(f"event {event.type!r} has seq {event.seq} in a record of seq {int(match[1])}")
    if isinstance(event, RunCreated) and event.schema_version > SCHEMA_VERSION:
        raise StorageError(
            f"run {event.run_id!r} was written with event schema {event.schema_version}, "
            f"this version reads up to {SCHEMA_VERSION}: upgrade pyworkflow-ray"
        )
    return event


def _newer_event(text: bytes, *, safe: bool, error: ValidationError) -> Event:
    raw: Any = from_json(text)
    kind = raw.get("type") if isinstance(raw, dict) else None
    if isinstance(kind, str) and kind not in _KNOWN_TYPES:
        if safe:
            return UnknownEvent.model_validate(raw)
        raise StorageError(
            f"event type {kind!r} is not known to this version and not marked safe to ignore: upgrade pyworkflow-ray"
        ) from None
    raise CorruptJournalError(f"an event of type {kind!r} does not fit its schema: {error}") from None


# Heads and seals --------------------------------------------------------------------------------------------------


class Head(BaseModel):
    """First record of an epoch's file, there from the moment the file has its name: whose epoch it is."""

    format: int = FORMAT_VERSION
    storage_id: str
    run_id: str
    epoch: int
    lease: str


class Part(BaseModel):
    """What counts of one epoch's file. last_seq: the run's last accepted seq at its end (-1: none yet)."""

    epoch: int
    last_seq: int
    length: int
    sha256: str


class Seal(BaseModel):
    """Second record of every file but epoch 0's: what its owner accepted of the epochs before.

    `parts` runs without a gap up to the epoch before, back to the last epoch that has a seal of its own.
    """

    parts: list[Part]


def head_body(head: Head) -> bytes:
    return b'{"head":%s}' % to_json(head)


def seal_body(seal: Seal) -> bytes:
    return b'{"seal":%s}' % to_json(seal)


def parse_head(body: bytes) -> Head | None:
    """None where the body is no head of this format; raises StorageError for a newer format."""
    if not body.startswith(b'{"head":'):
        return None
    raw = from_json(body)["head"]
    if isinstance(raw.get("format"), int) and raw["format"] > FORMAT_VERSION:
        raise StorageError(f"journal format {raw['format']} is newer than {FORMAT_VERSION}: upgrade pyworkflow-ray")
    return Head.model_validate(raw)


def parse_seal(body: bytes) -> Seal | None:
    if not body.startswith(b'{"seal":'):
        return None
    return Seal.model_validate(from_json(body)["seal"])
