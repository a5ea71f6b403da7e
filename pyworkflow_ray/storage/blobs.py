"""Content-addressed files: code snapshots, large payloads, the buffers of arrays and tables.

Called by `storage` and, through it, by the codec; calls `disk` and `memory`. A blob is written once, durable when its
name is given, checked by its hash whenever it is read, and large ones are mapped rather than read. Nothing removes
blobs. Faults: a crash between any two calls, a full disk, a damaged file, other processes that write the same blob.

A gigabyte is hashed in one thread while another writes it and a third makes what is written durable, so that it takes
as long as the slowest of the three.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pyworkflow_ray.errors import CorruptJournalError, StorageError
from pyworkflow_ray.storage import memory
from pyworkflow_ray.storage.directory import ensure_directory
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.journal import disk_error

FRESH_S: Final = 3600.0  # a blob is looked at again after so long
_MAPPED_BYTES: Final = 256 * 1024  # larger blobs are mapped
_PIECE_BYTES: Final = 8 * 1024 * 1024
_SYNCED_BYTES: Final = 64 * 1024 * 1024  # so much is written before it is made durable beside the writing
_ALIGNED: Final = 64  # buffers begin at such offsets: Arrow and numpy compute faster on them
_ZEROS: Final = bytes(_ALIGNED)


def layout(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes begin in one blob."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // _ALIGNED) * _ALIGNED
    return offsets


class Blobs:
    """The blobs of one storage directory. Safe to use from any thread."""

    def __init__(self, disk: Disk, root: str) -> None:
        self._disk = disk
        self._root = root
        self._seen: dict[str, float] = {}  # when this process last knew it there (monotonic)

    # Writing

    def put(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256, which is returned; storing them again costs a look."""
        digest = hashlib.sha256(data).hexdigest()
        if self._is_fresh(digest):
            return digest
        path = self.path(digest)
        directory = os.path.dirname(path)
        try:
            ensure_directory(self._disk, directory)
            if not self._holds(path, data):
                temporary = f"{self._root}/tmp/{self._disk.token()}"
                self._disk.write_file(temporary, data)
                try:
                    self._disk.rename(temporary, path)  # replaces a damaged one
                except OSError:
                    self._disk.unlink(temporary)
                    raise
            self._disk.sync_dir(directory)
        except OSError as error:
            raise disk_error("storing", path, error) from error
        self._seen[digest] = time.monotonic()
        return digest

    def put_parts(self, parts: Sequence[memoryview]) -> str:
        """Store the parts, each at its place of `layout`, as one blob. As `put`; nothing is copied in this process."""
        pieces = list(_pieces(parts))
        if sum(len(piece) for piece in pieces) <= _MAPPED_BYTES:
            return self.put(b"".join(pieces))
        temporary = f"{self._root}/tmp/{self._disk.token()}"
        try:
            digest, written = self._write_and_hash(temporary, pieces)
            path = self.path(digest)
            directory = os.path.dirname(path)
            if written:
                ensure_directory(self._disk, directory)
                self._disk.rename(temporary, path)
            self._disk.sync_dir(directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._disk.unlink(temporary)
            raise disk_error("storing", f"{self._root}/blobs", error) from error
        self._seen[digest] = time.monotonic()
        return digest

    def _write_and_hash(self, temporary: str, pieces: list[memoryview]) -> tuple[str, bool]:
        """The digest, and whether the file is there and durable; it is not where the blob exists already."""
        known = threading.Event()
        hasher = hashlib.sha256()

        def hash_all() -> str:
            for piece in pieces:
                hasher.update(piece)
            digest = hasher.hexdigest()
            if self._is_intact(digest):
                known.set()
            return digest

        fd = self._disk.create(temporary)
        try:
            with ThreadPoolExecutor(2, thread_name_prefix="blob") as threads:
                hashing = threads.submit(hash_all)
                syncing, unsynced = None, 0
                for piece in pieces:
                    if known.is_set():
                        break
                    self._disk.write(fd, piece)
                    unsynced += len(piece)
                    if unsynced >= _SYNCED_BYTES and (syncing is None or syncing.done()):
                        if syncing is not None:
                            syncing.result()  # after a failed sync the file is worth nothing
                        syncing, unsynced = threads.submit(self._disk.fdatasync, fd), 0
                if syncing is not None:
                    syncing.result()
                if not known.is_set():
                    self._disk.fsync(fd)
                digest = hashing.result()
        finally:
            self._disk.close(fd)
        if known.is_set():
            self._disk.unlink(temporary)
            return digest, False
        return digest, True

    def keep(self, digest: str) -> bool:
        """Whether a blob is there: whoever names it in a new record without storing it calls this first."""
        if self._is_fresh(digest):
            return True
        if not self._disk.exists(self.path(digest)):
            return False
        self._seen[digest] = time.monotonic()
        return True

    def _is_fresh(self, digest: str) -> bool:
        seen = self._seen.get(digest)
        return seen is not None and time.monotonic() - seen < FRESH_S

    def _holds(self, path: str, data: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._disk.read(path) == data
        return False

    def _is_intact(self, digest: str) -> bool:
        path = self.path(digest)
        with contextlib.suppress(OSError, CorruptJournalError):
            self._map(path, digest)
            return True
        return False

    # Reading

    def get(self, digest: str) -> bytes:
        """The bytes stored under `digest`.

        Raises:
            CorruptJournalError: what lies there has another hash.
            StorageError: nothing lies there, or it can't be read.
        """
        path = self._checked_path(digest)
        try:
            data = self._disk.read(path)
        except OSError as error:
            raise disk_error("reading", path, error) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(path)
        return data

    def open(self, digest: str) -> memoryview:
        """The bytes stored under `digest`, read-only; a large blob is mapped, not read. Raises as `get`."""
        path = self._checked_path(digest)
        try:
            return self._map(path, digest)
        except OSError as error:
            raise disk_error("reading", path, error) from error

    def _map(self, path: str, digest: str) -> memoryview:
        """Its hash is checked when the process maps it; what is mapped already is the same memory."""
        size = self._disk.size(path)
        known = memory.recall(memory.Place(digest, 0, size))
        if known is not None:
            return known
        view = memoryview(self._disk.read(path) if size <= _MAPPED_BYTES else self._disk.map(path))
        if _digest_of(view) != digest:
            raise _damaged(path)
        return memory.remember(view, digest)

    # Paths

    def path(self, digest: str) -> str:
        return f"{self._root}/blobs/{digest[:2]}/{digest}"

    def _checked_path(self, digest: str) -> str:
        if not is_digest(digest):
            raise StorageError(f"{digest!r} names no blob: 64 hexadecimal digits do", path=self._root)
        return self.path(digest)


def is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _pieces(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    """The bytes of the blob in pieces of a few megabytes."""
    for number, part in enumerate(parts):
        flat = part.cast("B")
        for at in range(0, len(flat), _PIECE_BYTES):
            yield flat[at : at + _PIECE_BYTES]
        gap = -len(flat) % _ALIGNED
        if gap and number + 1 < len(parts):
            yield memoryview(_ZEROS)[:gap]


def _digest_of(view: memoryview) -> str:
    return hashlib.sha256(view).hexdigest()  # lets other threads go on meanwhile


def _damaged(path: str) -> CorruptJournalError:
    return CorruptJournalError(f"{path} is damaged: its content has another hash than its name", path=path)
