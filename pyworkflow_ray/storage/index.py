"""The index of unfinished runs: a directory of empty files `RUN@EPOCH`, so that recovery lists and scans nothing.

Called by `storage`; calls `disk`. Rules:

* The entry of a run is durable before the run exists, or before the first event after a resume is acknowledged.
* EPOCH is the epoch from which on the run is unfinished: 0, or the epoch that resumed it. Its owner at epoch N removes
  only entries up to N, so an owner that is late with its removal never removes the entry of a later resume.
* An entry may be left of a run that ended (a crash before the removal) or that never came to be: whoever reads the run
  sees it. An entry is never missing for a run that is not finished.
"""

from __future__ import annotations

import re
from typing import Final

from pyworkflow_ray.storage.disk import Disk

_ENTRY: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@(0|[1-9][0-9]*)")


class ActiveIndex:
    def __init__(self, disk: Disk, directory: str) -> None:
        self._disk = disk
        self._directory = directory

    def add(self, run_id: str, epoch: int) -> None:
        """Idempotent; the caller syncs the directory."""
        self._disk.touch(f"{self._directory}/{run_id}@{epoch}")

    def remove(self, run_id: str, epoch: int) -> None:
        """Idempotent, and not synced: an entry that comes back after a power loss does no harm."""
        self._disk.unlink(f"{self._directory}/{run_id}@{epoch}")

    def has(self, run_id: str, epoch: int) -> bool:
        return self._disk.exists(f"{self._directory}/{run_id}@{epoch}")

    def run_ids(self) -> set[str]:
        matches = map(_ENTRY.fullmatch, self._names())
        return {match[1] for match in matches if match is not None}

    def entries(self, run_id: str, up_to: int) -> list[int]:
        """Epochs of the run's entries, none above `up_to`."""
        matches = map(_ENTRY.fullmatch, self._names())
        return sorted(int(m[2]) for m in matches if m is not None and m[1] == run_id and int(m[2]) <= up_to)

    def _names(self) -> list[str]:
        try:
            return self._disk.listdir(self._directory)
        except FileNotFoundError:
            return []  # a copy of the storage may leave out empty directories
