"""A real write: whether this storage takes one now, and how long it takes.

Called by `pyworkflow_ray.health` and by `doctor`, which give it a time limit; calls `disk`. Faults: a directory that
can't be written (read-only mount, permissions, another user's), a full disk or no inodes left, a disk whose sync fails,
bytes that read back otherwise, a disk that hangs (the caller's limit). What it writes has a name of its own in `tmp/`,
is gone again afterwards, and is no run's.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any, Final

from pyworkflow_ray.storage.disk import DISK, Disk
from pyworkflow_ray.storage.journal import disk_error

PROBE_BYTES: Final = 4096


@dataclass(slots=True, frozen=True)
class Probe:
    """What a write of 4 KiB took, in seconds, its fsync apart; bytes and inodes that are free (None: not told)."""

    write_s: float
    sync_s: float
    free_bytes: int | None
    free_share: float | None
    free_inodes: int | None


def probe_directory(root: str, disk: Disk = DISK) -> Probe:
    """Write, sync, read back and remove a file in the storage at `root`.

    Raises:
        StorageError: any of it failed; the message says which, and where.
    """
    path = f"{root}/tmp/{disk.token()}.probe"
    data = os.urandom(PROBE_BYTES)
    what = "writing"
    began = time.perf_counter()
    try:
        with contextlib.suppress(FileExistsError):
            disk.mkdir(f"{root}/tmp")  # a copy may have lost the empty ones
        disk.write_file(path, data, sync=False)
        wrote = time.perf_counter()
        try:
            what = "syncing"
            disk.sync_file(path)
            disk.sync_dir(f"{root}/tmp")
            synced = time.perf_counter()
            what = "reading back"
            if disk.read(path) != data:
                raise OSError(5, "other bytes came back than were written")
        finally:
            disk.unlink(path)
        what = "asking for the space left on"
        free = os.statvfs(root)
    except OSError as error:
        raise disk_error(what, path, error) from error
    return Probe(
        write_s=wrote - began,
        sync_s=synced - wrote,
        free_bytes=free.f_bavail * free.f_frsize,
        free_share=free.f_bavail / free.f_blocks if free.f_blocks else None,
        free_inodes=free.f_favail if free.f_files else None,
    )


def probe_storage(storage: Any) -> Probe:
    """As `probe_directory`; of a bucket whether it keeps conditional writes.

    Raises:
        StorageError: as `probe_directory`. ConfigurationError: the bucket ignores conditions.
    """
    bucket = getattr(storage, "bucket", None)
    if bucket is None:
        return probe_directory(storage.root, storage.disk)
    from pyworkflow_ray.storage.objects.loop import current_loop
    from pyworkflow_ray.storage.objects.probe import probe

    began = time.perf_counter()
    current_loop().run(probe(bucket))
    return Probe(time.perf_counter() - began, 0.0, None, None, None)
