"""Which run ids the checkpoints hold, and of which date: what makes an id one run after its directory is gone.

Called by `storage` for every run it makes or reads; calls `checkpoint_manifest`; loads no pyarrow. A list is a sorted
array of 64-bit numbers, little-endian: 48 bits of the id's SHA-256, then the day of its run's creation (days since
1970). 8 bytes a run: 8 MB a million, of which a lookup reads twenty numbers. Two ids in 2**48 look alike, so a hit is
looked up in the Parquet file before anything is refused for it.
"""

from __future__ import annotations

import array
import bisect
import datetime as dt
import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Final

from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage.checkpoint_files import Files
from pyworkflow_ray.storage.checkpoint_manifest import IdList, Manifest, numbers, read_manifest

IDS: Final = "ids"
_EPOCH: Final = dt.date(1970, 1, 1)
_TRIES: Final = 100


def id_key(run_id: str) -> int:
    """The 48 bits of an id, in the upper part of a 64-bit number."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:6], "big") << 16


def id_entry(run_id: str, date: str) -> int:
    return id_key(run_id) | (dt.date.fromisoformat(date) - _EPOCH).days


def encode_ids(entries: Iterable[int]) -> bytes:
    """A list's bytes."""
    packed = array.array("Q", sorted(entries))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def decode_ids(ids: IdList, files: Files) -> array.array[int]:
    """A list's numbers.

    Raises:
        CorruptJournalError: one bit of it is not as it was written, or it is missing.
        FileNotFoundError: it is gone.
    """
    data = files.read(ids.path)
    if len(data) != 8 * ids.count or hashlib.sha256(data).hexdigest() != ids.sha256:
        path = files.path(ids.path)
        raise CorruptJournalError(
            f"{path} is damaged: its content has another SHA-256 than its manifest says. Restore it", path=path
        )
    packed = array.array("Q")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed


def days_of(lists: Iterable[Sequence[int]], run_id: str) -> set[int]:
    """The days of the entries that these lists have for an id."""
    key = id_key(run_id)
    days = set()
    for entries in lists:
        at = bisect.bisect_left(entries, key)
        while at < len(entries) and entries[at] >> 16 == key >> 16:
            days.add(entries[at] & 0xFFFF)
            at += 1
    return days


class Checkpoints:
    """The manifest that counts and its lists of ids, kept in memory for as long as they stay the same.

    Safe to use from any thread: what is kept is replaced whole.
    """

    def __init__(self, files: Files, storage_id: str) -> None:
        self.files: Final = files
        self._storage_id = storage_id
        self._manifest = Manifest()
        self._known: tuple[Manifest, tuple[Sequence[int], ...]] = (Manifest(), ())
        self._lists: dict[str, array.array[int]] = {}

    def manifest(self) -> Manifest:
        """The manifest that counts now; costs a listing where it is still the same.

        Raises: as `read_manifest`.
        """
        found = numbers(self.files)
        known = self._manifest
        if not found or found[-1] != known.number:
            known = self._manifest = read_manifest(self.files, self._storage_id)
        return known

    def dates(self, run_id: str) -> list[str]:
        """The dates of which a compacted run of this id may be; none where it is surely not compacted.

        Raises:
            CorruptJournalError: manifest or list is damaged.
        """
        return [(_EPOCH + dt.timedelta(days=day)).isoformat() for day in sorted(days_of(self._current(), run_id))]

    def _current(self) -> tuple[Sequence[int], ...]:
        missing = ""
        for _ in range(_TRIES):
            manifest = self.manifest()
            if manifest is self._known[0]:
                return self._known[1]
            lists = {}
            try:
                for ids in manifest.ids:
                    missing = self.files.path(ids.path)
                    lists[ids.path] = self._lists.get(ids.path) or decode_ids(ids, self.files)
            except FileNotFoundError:
                if numbers(self.files)[-1:] == [manifest.number]:
                    raise CorruptJournalError(f"{missing} is missing: restore it", path=missing) from None
                continue  # merged away meanwhile
            except OSError as error:
                raise StorageError(f"{missing} can't be read: {error}", path=missing) from error
            self._lists = lists
            self._known = (manifest, tuple(lists.values()))
            return self._known[1]
        raise StorageError(f"{self.files.path('')} changed during each of {_TRIES} readings", path=self.files.path(""))
