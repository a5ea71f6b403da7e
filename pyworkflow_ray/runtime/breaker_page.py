"""The page: shared memory in which a breaker's actor writes changes of state, for the processes of its node to see.

The actor has a `PageWriter`, each process's channel maps it (`Page.open`), and each of its links looks at one counter
of it before a call passes. So a process refuses from its next call on after a trip, however many others have to be
woken by the line at the same moment (benchmarks/breakers.py, docs/decisions/0027). Rules:

* A key has a slot, which other keys may share: a counter and the latest change told there. The counter grows after the
  change is written. Who finds it grown reads the change, and asks the actor where that is another key's or unreadable.
* A page is a quicker message and nothing else: what is read from it counts as what the line tells, by its version.
* Only processes of the actor's machine and user can map it: it has no name but the actor's descriptor.

Faults: the actor dies (its page stays as it is while it is mapped; the next actor has another); its number is another
process's by now (the token differs); a change is read while it is written (its check fails); a view is too large for a
slot (nothing is written but the counter); there is no such memory here (no page: the line alone tells).
"""

from __future__ import annotations

import mmap
import os
import pickle
import secrets
import struct
import time
import zlib
from dataclasses import dataclass, field, replace
from typing import Final

from pyworkflow_ray.resilience.breaker import View

SLOTS: Final = 64
SLOT_BYTES: Final = 1024
TOKEN_BYTES: Final = 32
PAGE_BYTES: Final = TOKEN_BYTES + SLOTS * SLOT_BYTES
_COUNTER_BYTES: Final = 8
_HEAD: Final = struct.Struct("<II")  # CRC-32 and length of what follows


@dataclass(slots=True, frozen=True)
class PageAddress:
    """Where the actor's machine has a page: in which process, at which descriptor, and what it begins with."""

    pid: int
    descriptor: int
    token: bytes = field(repr=False)


def slot_of(key: str | None) -> int:
    """The slot of a breaker's key; None: the breaker itself."""
    return 0 if key is None else 1 + zlib.crc32(key.encode("utf-8", "surrogatepass")) % (SLOTS - 1)


class PageWriter:
    """The actor's end. `address` is None where there is no such memory. For one thread."""

    def __init__(self) -> None:
        self.address: PageAddress | None = None
        create = getattr(os, "memfd_create", None)  # Linux alone has it
        if create is None:
            return
        try:
            descriptor = create("pyworkflow-ray breaker")
            os.ftruncate(descriptor, PAGE_BYTES)
            self._memory = mmap.mmap(descriptor, PAGE_BYTES)
        except OSError:
            return
        token = secrets.token_bytes(TOKEN_BYTES)
        self._memory[:TOKEN_BYTES] = token
        self._counters = memoryview(self._memory).cast("Q")
        self.address = PageAddress(os.getpid(), descriptor, token)

    def write(self, key: str | None, view: View) -> None:
        """Tell a change of state. The view is of this moment."""
        if self.address is None:
            return
        at = TOKEN_BYTES + slot_of(key) * SLOT_BYTES
        body = pickle.dumps((key, view, time.monotonic()), protocol=pickle.HIGHEST_PROTOCOL)
        room = SLOT_BYTES - _COUNTER_BYTES - _HEAD.size
        head = _HEAD.pack(zlib.crc32(body), len(body)) if len(body) <= room else _HEAD.pack(0, 0)
        written = head + (body if len(body) <= room else b"")
        self._memory[at + _COUNTER_BYTES : at + _COUNTER_BYTES + len(written)] = written
        self._counters[at // _COUNTER_BYTES] += 1


class Page:
    """A process's end, read by any thread. `counters[slot]` is the number of changes that were told in it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._counters = memoryview(memory).cast("Q")

    @classmethod
    def open(cls, address: PageAddress) -> Page | None:
        """The page at `address`; None where it can't be mapped, or is not there any more."""
        try:
            descriptor = os.open(f"/proc/{address.pid}/fd/{address.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                memory = mmap.mmap(descriptor, PAGE_BYTES, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        except (OSError, ValueError):
            return None
        return cls(memory) if secrets.compare_digest(memory[:TOKEN_BYTES], address.token) else None

    def counter(self, key: str | None) -> memoryview:
        """One item, the counter of this key's slot: what a call looks at."""
        at = (TOKEN_BYTES + slot_of(key) * SLOT_BYTES) // _COUNTER_BYTES
        return self._counters[at : at + 1]

    def read(self, key: str | None) -> View | None:
        """The latest change of this key, its durations as of now; None where it can't be told from the page."""
        at = TOKEN_BYTES + slot_of(key) * SLOT_BYTES + _COUNTER_BYTES
        check, length = _HEAD.unpack_from(self._memory, at)
        body = self._memory[at + _HEAD.size : at + _HEAD.size + length]
        if length == 0 or length > SLOT_BYTES or zlib.crc32(body) != check:
            return None
        whose, view, written_at = pickle.loads(body)
        return _aged(view, max(0.0, time.monotonic() - written_at)) if whose == key else None


def _aged(view: View, by_s: float) -> View:
    """The view, its durations being as long ago as it was written. (The clock is the machine's, one for all.)"""
    return replace(
        view,
        open_for_s=None if view.open_for_s is None else max(0.0, view.open_for_s - by_s),
        permits=tuple((permit, None if rest is None else max(0.0, rest - by_s)) for permit, rest in view.permits),
        nodes=tuple((name, _aged(own, by_s)) for name, own in view.nodes),
    )
