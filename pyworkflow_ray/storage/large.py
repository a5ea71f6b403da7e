"""Large buffers of values: stored once as blobs, passed on by name, handed on as shared memory while that lives.

Called by the codec; calls the blob store, `memory`, and the runtime's shared objects where there are some. Pickle's
protocol 5 takes the buffers of arrays and tables out of a value (`pickling.dump`): what is left is a small text, and a
frame of that text with the places of the buffers is the value's stored form.

Rules:
* A buffer that lies in a blob already (it was decoded here, and nothing can write to it) is named, not stored again.
* A blob is durable before its name is given. Ray's object beside it is a copy that saves the reading, and may be lost
  at any time.
* Buffers come back as read-only memory, whatever they were: they are shared with everybody else who has the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic_core import from_json, to_json

from pyworkflow_ray.errors import PayloadError
from pyworkflow_ray.storage import memory
from pyworkflow_ray.storage.blobs import layout
from pyworkflow_ray.storage.memory import Place

OWN_BYTES = 4 * 1024 * 1024  # so large a buffer is a blob of its own; smaller ones of a value lie in one together
SHARED_BYTES = 1024 * 1024  # so large a blob is worth an object of Ray's beside it

Segments = Sequence[tuple[int, memoryview]]  # offset in the blob, and the bytes from there on


class Offer(Protocol):
    """Buffers on their way into shared memory."""

    def made(self, digest: str) -> None:
        """The blob is durable: from now on others find the buffers under its name."""
        ...

    def drop(self) -> None:
        """The blob could not be stored: nobody needs them."""
        ...


class Sharing(Protocol):
    """Memory shared with other processes. Implemented by the runtime with Ray's objects. Nothing here raises."""

    def begin(self, parts: Sequence[memoryview]) -> Offer | None:
        """Start copying the parts, laid out as a blob of them is, in the background; None: not shared."""
        ...

    def find(self, digest: str) -> Segments | None:
        """The parts of a blob as read-only memory; None where they are lost, or never were shared."""
        ...


class LargeBuffers:
    """Stores and opens buffers.

    Args:
        blobs: The codec's `BlobStore`. One that can take parts and open blobs (`Storage`) copies nothing.
        sharing: Ray's objects; None: blobs alone.
    """

    def __init__(self, blobs: Any, sharing: Sharing | None = None) -> None:
        self._blobs = blobs
        self._sharing = sharing

    def put(self, buffers: Sequence[memoryview]) -> list[Place]:
        """Where each buffer lies, durably."""
        places = [self._known(buffer) for buffer in buffers]
        fresh = [number for number, place in enumerate(places) if place is None]
        own = [[number] for number in fresh if buffers[number].nbytes >= OWN_BYTES]
        together = [number for number in fresh if buffers[number].nbytes < OWN_BYTES]
        for group in [*own, together]:
            if not group:
                continue
            parts = [buffers[number] for number in group]
            digest = self._write(parts)
            for number, offset in zip(group, layout([part.nbytes for part in parts]), strict=True):
                places[number] = Place(digest, offset, buffers[number].nbytes)
        return [place for place in places if place is not None]

    def _known(self, buffer: memoryview) -> Place | None:
        place = memory.find(buffer)
        keep = getattr(self._blobs, "keep_blob", None)
        return place if place is not None and keep is not None and keep(place.digest) else None

    def _write(self, parts: list[memoryview]) -> str:
        offer = None
        if self._sharing is not None and sum(part.nbytes for part in parts) >= SHARED_BYTES:
            offer = self._sharing.begin(parts)
        try:
            put_parts = getattr(self._blobs, "put_blob_parts", None)
            digest: str = put_parts(parts) if put_parts is not None else self._blobs.put_blob(_joined(parts))
        except BaseException:
            if offer is not None:
                offer.drop()
            raise
        if offer is not None:
            offer.made(digest)
        return digest

    def open(self, places: Sequence[Place]) -> list[memoryview]:
        """The buffers as read-only memory."""
        opened: dict[str, Segments] = {}
        views = []
        for place in places:
            view = memory.recall(place)
            if view is None:
                if place.digest not in opened:
                    opened[place.digest] = self._open_blob(place.digest)
                view = _slice(opened[place.digest], place)
            views.append(view)
        return views

    def _open_blob(self, digest: str) -> Segments:
        shared = self._sharing.find(digest) if self._sharing is not None else None
        if shared is not None:
            return [(offset, memory.remember(view, digest, offset)) for offset, view in shared]
        open_blob = getattr(self._blobs, "open_blob", None)
        return [(0, open_blob(digest) if open_blob is not None else memoryview(self._blobs.get_blob(digest)))]


def _joined(parts: Sequence[memoryview]) -> bytes:
    offsets = layout([part.nbytes for part in parts])
    data = bytearray(offsets[-1] + parts[-1].nbytes)
    for offset, part in zip(offsets, parts, strict=True):
        data[offset : offset + part.nbytes] = part
    return bytes(data)


def _slice(segments: Segments, place: Place) -> memoryview:
    for offset, view in segments:
        at = place.offset - offset
        if at >= 0 and at + place.length <= view.nbytes:
            return view[at : at + place.length]
    raise PayloadError(f"a stored value is damaged: blob {place.digest} has no {place.length} bytes at {place.offset}")


# Frames -----------------------------------------------------------------------------------------------------------


def frame(text: bytes, places: Sequence[Place]) -> bytes:
    """The stored form of a value whose buffers lie in blobs."""
    digests = list(dict.fromkeys(place.digest for place in places))
    number = {digest: index for index, digest in enumerate(digests)}
    head = to_json({"d": digests, "p": [[number[place.digest], place.offset, place.length] for place in places]})
    return len(head).to_bytes(4, "big") + head + text


def whole_frame(text: bytes, buffers: Sequence[memoryview]) -> bytes:
    """The stored form with the buffers in it: what is encrypted is encrypted as a whole."""
    head = to_json({"t": len(text), "s": [buffer.nbytes for buffer in buffers]})
    return b"".join([len(head).to_bytes(4, "big"), head, text, *buffers])


def unframe(data: bytes | memoryview, large: LargeBuffers) -> tuple[memoryview, list[memoryview]]:
    """Text and buffers of a frame of either form."""
    view = memoryview(data)
    try:
        at = 4 + int.from_bytes(view[:4], "big")
        head = from_json(bytes(view[4:at]))
        if "s" in head:
            text, at = view[at : at + head["t"]], at + head["t"]
            buffers = []
            for size in head["s"]:
                buffers.append(memoryview(bytes(view[at : at + size])))  # copied: aligned
                at += size
            return text, buffers
        places = [Place(head["d"][number], offset, length) for number, offset, length in head["p"]]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PayloadError(f"a stored value is damaged: the frame of its buffers can't be read ({error})") from error
    return view[at:], large.open(places)
