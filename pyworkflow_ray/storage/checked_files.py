"""The files of checkpoints as DuckDB reads them: lazily, only the parts that a query needs, and every byte checked.

Made by `sql`, called by DuckDB's threads; calls the operating system. Decision 12 has the reasons. Rules:

* A file's blocks of 16 KiB each have a CRC32. They are computed when a file is first met, of bytes whose SHA-256 is the
  manifest's, and kept in the catalogue.
* DuckDB gets bytes only of blocks whose sum is right, read for this request: no cache, no note and no later reading
  comes between what was checked and what is used.
* Only the files given are served, for reading. All are opened at once, so a compaction that removes some of them does
  not disturb the query; of very many the rest is opened when it is needed.

Faults: flipped bits, cut and missing files, a failing disk: `DamagedFile` for the one that DuckDB passes on as text.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from fsspec import AbstractFileSystem

from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage.checkpoint_manifest import ParquetFile

PROTOCOL: Final = "checkpoint"
BLOCK: Final = 16_384
_SUM_BYTES: Final = 4
_OPEN_AT_ONCE: Final = 256  # of the 1,024 descriptors that a process usually may have
_READ: Final = 64 * BLOCK
_WHEN: Final = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)  # files never change


def url(file: ParquetFile) -> str:
    """What DuckDB calls the file."""
    return f"{PROTOCOL}://{file.path}"


def sums_of(path: str, file: ParquetFile) -> bytes:
    """The sums of a file's blocks, of exactly the bytes that its manifest describes.

    Raises:
        CorruptJournalError: one bit of it is not as it was written. FileNotFoundError, OSError: it can't be read.
    """
    sums, sha, length = [], hashlib.sha256(), 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := _pread(fd, _READ, length):
            sha.update(data)
            view = memoryview(data)
            sums += [zlib.crc32(view[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
            length += len(data)
    finally:
        os.close(fd)
    if length != file.bytes or sha.hexdigest() != file.sha256:
        raise _damaged(path, "its content has another SHA-256 than its manifest says")
    return b"".join(number.to_bytes(_SUM_BYTES, "big") for number in sums)


def all_sums(files: Sequence[tuple[str, ParquetFile]]) -> dict[str, bytes]:
    """`sums_of` of many files, by their paths in the manifest, on all CPUs."""
    with ThreadPoolExecutor(os.cpu_count() or 1, "checkpoints") as pool:
        found = pool.map(lambda item: sums_of(*item), files)
        return {file.path: sums for (_, file), sums in zip(files, found, strict=True)}


def _damaged(path: str, why: str) -> CorruptJournalError:
    return CorruptJournalError(f"{path} is damaged: {why}. Restore it", path=path)


def _pread(fd: int, length: int, start: int) -> bytes:
    """All of `length` bytes that the file has from `start` on."""
    data = os.pread(fd, length, start)
    while data and len(data) < length:
        more = os.pread(fd, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


class _File:
    """One file and its sums. Closed when nothing refers to it any more."""

    def __init__(self, path: str, file: ParquetFile, sums: bytes) -> None:
        self.path = path
        self.size = file.bytes
        self._sums = sums
        self._fd: int | None = None
        self._opening = threading.Lock()

    def open(self) -> int:
        with self._opening:  # of two threads one would lose its descriptor
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fd

    def read(self, start: int, length: int) -> bytes:
        """Checked bytes.

        Raises:
            CorruptJournalError: a block of them is not as it was written. StorageError: it can't be read.
        """
        length = max(0, min(length, self.size - start))
        first = start // BLOCK * BLOCK
        stop = min(self.size, -(-(start + length) // BLOCK) * BLOCK)
        try:
            data = _pread(self.open(), stop - first, first)
        except FileNotFoundError:
            text = f"{self.path} is gone: a compaction replaced it before the query came to it. Ask again"
            raise StorageError(text, path=self.path) from None
        except OSError as error:
            raise StorageError(f"{self.path} can't be read: {error}", path=self.path) from error
        if len(data) != stop - first:
            raise _damaged(self.path, f"it ends at byte {first + len(data)}, not {self.size}")
        view, number = memoryview(data), first // BLOCK
        for at in range(0, len(data), BLOCK):
            expected = self._sums[_SUM_BYTES * number : _SUM_BYTES * (number + 1)]
            if zlib.crc32(view[at : at + BLOCK]).to_bytes(_SUM_BYTES, "big") != expected:
                raise _damaged(self.path, f"its block at byte {first + at} is not as it was written")
            number += 1
        return data if len(data) == length else data[start - first : start - first + length]

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


class Held:
    """A file of a bucket, held in memory as it was read and checked."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.size = len(data)
        self._data = data

    def read(self, start: int, length: int) -> bytes:
        return self._data[start : start + length]


class _Handle:
    """An open file. Threads share handles and call seek and read one after the other, so each has its own position."""

    __slots__ = ("_at", "_fail", "_file")

    def __init__(self, file: _File | Held, fail: Callable[[StorageError], None]) -> None:
        self._file = file
        self._fail = fail
        self._at = threading.local()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            offset += self._file.size if whence == io.SEEK_END else self.tell()
        self._at.position = offset
        return offset

    def tell(self) -> int:
        return int(getattr(self._at, "position", 0))

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        try:
            data = self._file.read(start, self._file.size if size < 0 else size)
        except StorageError as error:
            self._fail(error)
            raise
        self._at.position = start + len(data)
        return data

    def close(self) -> None:
        """The file stays open for the other handles."""


class CheckedFiles(AbstractFileSystem):  # type: ignore[misc]
    """A file system of these files alone.

    Attributes:
        errors: what was found wrong while DuckDB read, oldest first; DuckDB itself passes on no more than the text.
    """

    protocol = PROTOCOL
    cachable = False  # fsspec would hand out one object for all storages

    def __init__(self) -> None:  # without arguments: fsspec makes a token of them, file by file
        super().__init__()
        self.errors: list[StorageError] = []
        self._files: dict[str, _File | Held] = {}

    def serve(self, files: Iterable[tuple[str, ParquetFile]], sums: Mapping[str, bytes]) -> CheckedFiles:
        """Serve these files from now on, and open them; itself.

        Raises:
            FileNotFoundError, OSError: one can't be opened.
        """
        served = {url(file): _File(path, file, sums[file.path]) for path, file in files}
        for file in list(served.values())[:_OPEN_AT_ONCE]:
            file.open()
        self._files = dict(served)
        return self

    def hold(self, files: Mapping[str, Held]) -> CheckedFiles:
        """Serve these from now on, by what DuckDB calls them; itself."""
        self._files = dict(files)
        return self

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> _Handle:
        if mode != "rb":
            raise PermissionError(f"{path} is read-only")
        return _Handle(self._find(path), self.errors.append)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self._find(path).size, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return path in self._files

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path] if path in self._files else []

    def modified(self, path: str) -> dt.datetime:
        return _WHEN

    def _find(self, path: str) -> _File | Held:
        try:
            return self._files[path]
        except KeyError:
            raise FileNotFoundError(f"{path} is no file of a checkpoint") from None
