"""Read-only memory of this process whose content lies in a blob, found again by its address.

Called by `blobs` and the runtime's shared objects, which bring such memory into the process, and by the codec, which
asks where a buffer that it is to store comes from. A gigabyte that a workflow hands from one step to the next is then
named, not hashed and written again.

Rules:
* Only memory that cannot change is remembered: a file mapped for reading, an object of Ray's store.
* An entry ends with the object that exports the memory, before the memory is free: another value at the same address
  is never taken for it.
* Without numpy and pyarrow, which alone tell an address, nothing is remembered and everything is stored anew.
"""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from typing import Any, NamedTuple


class Place(NamedTuple):
    """`length` bytes from `offset` on of the blob `digest`."""

    digest: str
    offset: int
    length: int


class _Entry(NamedTuple):
    start: int
    end: int
    digest: str
    offset: int
    alive: Any


_lock = threading.RLock()  # a weak reference may end while this thread holds it
_entries: list[_Entry] = []  # by address; they do not overlap
_by_digest: dict[str, list[_Entry]] = {}


def remember(view: memoryview, digest: str, offset: int = 0) -> memoryview:
    """The same memory, remembered as what lies at `offset` of the blob `digest` as long as anybody uses it.

    Args:
        view: Read-only bytes that never change. What is decoded must be made from the result, not from `view`.
    """
    exporter = _exporter(view)
    if exporter is None or not view.nbytes:
        return view
    kept, start = exporter
    entry = _Entry(start, start + view.nbytes, digest, offset, weakref.ref(kept, _forget))
    with _lock:
        bisect.insort(_entries, entry, key=lambda known: known.start)
        _by_digest.setdefault(digest, []).append(entry)
    return memoryview(kept)


def recall(place: Place) -> memoryview | None:
    """These bytes of a blob where they are remembered; None where the blob must be opened."""
    with _lock:
        for entry in _by_digest.get(place.digest, ()):
            exporter = entry.alive()
            at = place.offset - entry.offset
            if exporter is not None and at >= 0 and at + place.length <= entry.end - entry.start:
                return memoryview(exporter)[at : at + place.length]
    return None


def find(buffer: memoryview) -> Place | None:
    """Where these bytes lie, if they are remembered memory; None where they must be stored."""
    if not _entries or not buffer.readonly or not buffer.nbytes:
        return None
    exporter = _exporter(buffer)
    if exporter is None:
        return None
    start = exporter[1]
    with _lock:
        index = bisect.bisect_right(_entries, start, key=lambda known: known.start) - 1
        if index < 0:
            return None
        entry = _entries[index]
        if start + buffer.nbytes > entry.end or entry.alive() is None:
            return None
        return Place(entry.digest, entry.offset + start - entry.start, buffer.nbytes)


def _forget(reference: Any) -> None:
    with _lock:
        gone = [entry for entry in _entries if entry.alive is reference]
        _entries[:] = [entry for entry in _entries if entry.alive is not reference]
        for entry in gone:
            left = [known for known in _by_digest.get(entry.digest, ()) if known.alive is not reference]
            if left:
                _by_digest[entry.digest] = left
            else:
                _by_digest.pop(entry.digest, None)


def _exporter(view: memoryview) -> tuple[Any, int] | None:
    """An object that exports this memory, can be referred to weakly and lives as long as any view of it; its address.

    What is made of a memoryview keeps the exporter at its bottom alive, not the memoryview itself.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        array = numpy.frombuffer(view, dtype=numpy.uint8)
        return array, int(array.__array_interface__["data"][0])
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow is not None:
        buffer = pyarrow.py_buffer(view)
        return buffer, int(buffer.address)
    return None
