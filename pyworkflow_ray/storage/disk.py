"""The operating system's file calls, as the journal needs them: one seam for faults and for the model check.

Called by `storage`, `journal`, `lease`; calls `os`. Faults that may strike here: ENOSPC and EFBIG (a write may have
written a part), EIO on write and on fsync (after which nothing may be believed of the file), a crash or power loss
between any two calls (only what was synced before is sure), another process between any two calls. Tests subclass
`Disk` and let each of them happen to the real code.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import uuid
from typing import Final

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700


class Disk:
    """A local file system. Every descriptor is close-on-exec. Paths are absolute."""

    def token(self) -> str:
        """A name nobody else uses."""
        return uuid.uuid4().hex

    # What readers need

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def read(self, path: str, limit: int | None = None, start: int = 0) -> bytes:
        """The file's bytes from `start` on, at most `limit` of them."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if start:
                os.lseek(fd, start, os.SEEK_SET)
            size = os.fstat(fd).st_size + 1 if limit is None else limit
            chunks = []
            while size > 0:
                chunk = os.read(fd, size)
                if not chunk:
                    break
                chunks.append(chunk)
                size = max(size - len(chunk), 0 if limit is not None else 65536)
            return b"".join(chunks)
        finally:
            os.close(fd)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return os.stat(path).st_size

    def map(self, path: str) -> mmap.mmap:
        """The file, which is not empty, as read-only memory that outlives its name."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def identity(self, path: str) -> tuple[int, int, int]:
        """(inode, size, time of the last change in ns): stays equal while a file that only grows is as it was."""
        found = os.stat(path)
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    # Whole files and names

    def create(self, path: str) -> int:
        """A descriptor for a new file; FileExistsError where it exists."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def write_file(self, path: str, data: bytes, *, sync: bool = True) -> None:
        """Create `path`, which must not exist, with `data`, durable but for its name. Leaves no file where it fails."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            self.write(fd, data)
            if sync:
                self.fsync(fd)
        except OSError:  # a disk that is full stays full of what was tried again and again
            self.unlink(path)
            raise
        finally:
            os.close(fd)

    def sync_file(self, path: str) -> None:
        """Make a file's content durable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def sync_old_epoch(self, path: str) -> None:
        """Make durable what another owner left in its file, and let the next reading come from the disk.

        The pages are dropped from the cache (best effort): after a failed write-back they look clean and hold what the
        disk does not.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; FileExistsError where the name is taken."""
        os.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Move a file or directory; FileExistsError where the target is a directory that is not empty."""
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
            raise

    def touch(self, path: str) -> None:
        """Create an empty file unless it exists."""
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))

    def unlink(self, path: str) -> None:
        """Remove a file; no error where it is gone."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def mkdir(self, path: str) -> None:
        """Make a directory, mode 0700; FileExistsError where it exists."""
        os.mkdir(path, DIRECTORY_MODE)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    # The append path

    def open_append(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def try_lock(self, fd: int) -> bool:
        """Take the file's exclusive lock if nobody holds it; freed with the descriptor."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def write(self, fd: int, data: bytes | memoryview) -> None:
        """Write all of `data`; on an error a part of it may have been written."""
        written = os.write(fd, data)
        while written < len(data):
            written += os.write(fd, data[written:])

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)


DISK: Final = Disk()
