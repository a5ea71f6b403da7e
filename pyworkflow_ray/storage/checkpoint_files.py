"""Where checkpoints lie: four calls, the same on a disk and on an object store.

Called by the `checkpoint*` and `compact*` modules; calls `disk`. Names are relative to the storage's `checkpoints`.
Faults: a crash between any two calls, others who do the same (publishing is exclusive), a full or failing disk.
"""

from __future__ import annotations

import os
from typing import Protocol

from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.disk import Disk


class Files(Protocol):
    """What checkpoints need of a store. Every call may raise OSError."""

    def path(self, name: str) -> str:
        """Where it lies, for people."""

    def list(self, directory: str = "") -> list[str]:
        """The names in a directory, files and directories; none where it is missing."""

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The file's bytes from `start` on, at most `length`; FileNotFoundError where there is none."""

    def publish(self, name: str, data: bytes) -> None:
        """Create the file, whole and durable, its name too; FileExistsError where the name is taken."""

    def remove(self, name: str) -> None:
        """Remove the file; no error where it is gone. Not durable by itself."""


class DiskFiles:
    """`Files` below one directory of a local disk; `temporary` is a directory beside it."""

    def __init__(self, disk: Disk, root: str, temporary: str) -> None:
        self._disk = disk
        self._root = root
        self._temporary = temporary

    def path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def list(self, directory: str = "") -> list[str]:
        try:
            return self._disk.listdir(self.path(directory))
        except FileNotFoundError:
            return []

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self._disk.read(self.path(name), length, start)

    def publish(self, name: str, data: bytes) -> None:
        disk, path = self._disk, self.path(name)
        directory = os.path.dirname(path)
        self._make(directory)
        temporary = f"{self._temporary}/{disk.token()}"
        failpoint("checkpoint.before_write")
        try:
            disk.write_file(temporary, data)
            failpoint("checkpoint.before_link")
            disk.link(temporary, path)
        finally:
            disk.unlink(temporary)
        failpoint("checkpoint.before_sync")
        disk.sync_dir(directory)

    def _make(self, directory: str) -> None:
        if self._disk.exists(directory):
            return
        if directory != os.path.dirname(self._root):
            self._make(os.path.dirname(directory))
        try:
            self._disk.mkdir(directory)
        except FileExistsError:
            pass
        self._disk.sync_dir(os.path.dirname(directory))

    def remove(self, name: str) -> None:
        self._disk.unlink(self.path(name))
