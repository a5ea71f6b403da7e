"""The index of unfinished runs: a directory of empty files `RUN@EPOCH`, so that recovery lists and scans nothing.

Beside it, of the same form, the runs that ended and that the catalogue (`listing`) has not taken in yet.

Called by `storage` and `listing`; calls `disk`. Rules:

* The entry of a run is durable before the run exists, or before the first event after a resume is acknowledged.
* EPOCH is the epoch from which on the run is unfinished: 0, or the epoch that resumed it. Its owner at epoch N removes
  only entries up to N, so an owner that is late with its removal never removes the entry of a later resume.
* An entry may be left of a run that ended (a crash before the removal) or that never came to be: whoever reads the run
  sees it. An entry is never missing for a run that is not finished.
* The entry of a run that ends is not removed but renamed into `ended`, in one step: a crash leaves it in one of the two
  directories, never in none, and so no listing forgets the run. From there `listing` removes it once the catalogue
  holds the run, durably.
"""

from __future__ import annotations

import re
from typing import Final

from pyworkflow_ray.storage.directory import ensure_directory
from pyworkflow_ray.storage.disk import Disk

_ENTRY: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@(0|[1-9][0-9]*)")


class ActiveIndex:
    def __init__(self, disk: Disk, directory: str, ended: str) -> None:
        self._disk = disk
        self._directory = directory
        self._ended = ended

    def add(self, run_id: str, epoch: int) -> None:
        """Idempotent; the caller syncs the directory."""
        self._disk.touch(f"{self._directory}/{run_id}@{epoch}")

    def remove(self, run_id: str, epoch: int) -> None:
        """Idempotent, and not synced: an entry that comes back after a power loss does no harm."""
        entry = f"{run_id}@{epoch}"
        try:
            self._disk.rename(f"{self._directory}/{entry}", f"{self._ended}/{entry}")
        except FileNotFoundError:
            if self._disk.exists(f"{self._directory}/{entry}"):  # then it is the other directory that a copy left out
                ensure_directory(self._disk, self._ended)
                self.remove(run_id, epoch)

    def has(self, run_id: str, epoch: int) -> bool:
        return self._disk.exists(f"{self._directory}/{run_id}@{epoch}")

    def run_ids(self) -> set[str]:
        matches = map(_ENTRY.fullmatch, self._names(self._directory))
        return {match[1] for match in matches if match is not None}

    def entries(self, run_id: str, up_to: int) -> list[int]:
        """Epochs of the run's entries, none above `up_to`."""
        matches = map(_ENTRY.fullmatch, self._names(self._directory))
        return sorted(int(m[2]) for m in matches if m is not None and m[1] == run_id and int(m[2]) <= up_to)

    def ended(self) -> list[tuple[str, int]]:
        """(run id, epoch) of the runs that ended, or were moved or removed, since the catalogue looked at them."""
        matches = map(_ENTRY.fullmatch, self._names(self._ended))
        return sorted((match[1], int(match[2])) for match in matches if match is not None)

    def note_ended(self, run_id: str, epoch: int = 0) -> None:
        """Have the catalogue look at a run again: whoever removes an ended run calls this first, and syncs nothing."""
        ensure_directory(self._disk, self._ended)
        self._disk.touch(f"{self._ended}/{run_id}@{epoch}")

    def forget_ended(self, run_id: str, epoch: int) -> None:
        """The catalogue holds the run as it is, durably."""
        self._disk.unlink(f"{self._ended}/{run_id}@{epoch}")

    def _names(self, directory: str) -> list[str]:
        try:
            return self._disk.listdir(directory)
        except FileNotFoundError:
            return []  # a copy of the storage may leave out empty directories
