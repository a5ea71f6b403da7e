"""A disk in memory that keeps a log of what was done to it, and every state in which a power loss may leave it.

The rules are those of POSIX and no more (as in "All File Systems Are Not Created Equal", OSDI 2014):

* What was written to a file is sure once the file was synced. Until then any part of it may be there: nothing, all of
  it, its first half, or its length filled with NULs.
* A name (made, moved, removed) is sure once its directory was synced after it. Until then it may be there or not,
  whatever became of others; that a file was synced says nothing about its name.
* A rename happens as a whole; it is sure once the directory of the new name was synced.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pyworkflow_ray.storage.disk import Disk

_MOST: Final = 9  # unsure things of which all combinations are tried; of more a sample


@dataclass(frozen=True)
class Op:
    """call: "write" to `file`; "sync" of `file`; a name: "make" (of `file`, or of a directory where it is None),
    "remove" or "move" (from `source`); "syncdir" of `path`."""

    call: str
    path: str = ""
    file: int | None = None
    data: bytes = b""
    source: str = ""


class Tree:
    """Names and contents. names: path to file number, None for a directory."""

    def __init__(self, names: Mapping[str, int | None], contents: Mapping[int, bytes]) -> None:
        self.names: dict[str, int | None] = dict(names)
        self.contents: dict[int, bytes] = dict(contents)

    def apply(self, op: Op) -> None:
        """One operation on names; what it needs may be gone, then nothing happens."""
        parent = os.path.dirname(op.path)
        if op.call == "make" and self.names.get(parent, 0) is None and op.path not in self.names:
            self.names[op.path] = op.file
        elif op.call == "remove":
            self.names.pop(op.path, None)
        elif op.call == "move" and op.source in self.names and self.names.get(parent, 0) is None:
            for name in [name for name in self.names if name == op.path or name.startswith(f"{op.path}/")]:
                del self.names[name]
            for name in [name for name in self.names if name == op.source or name.startswith(f"{op.source}/")]:
                self.names[op.path + name.removeprefix(op.source)] = self.names.pop(name)


class LoggedDisk(Disk):
    """A whole file system in memory."""

    def __init__(self, tree: Tree | None = None) -> None:
        tree = tree or Tree({"/": None}, {})
        self.tree = Tree(tree.names, tree.contents)
        self.start = Tree(tree.names, tree.contents)
        self.log: list[Op] = []
        self._next = max(self.tree.contents, default=0) + 1
        self._descriptors: dict[int, int] = {}
        self._tokens = 0

    def token(self) -> str:
        self._tokens += 1
        return f"t{len(self.start.names)}-{self._tokens}"

    def _do(self, op: Op) -> None:
        self.log.append(op)
        self.tree.apply(op)

    def _file(self, path: str) -> int:
        file = self.tree.names.get(path, -1)
        if file == -1:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        if file is None:
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        return file

    def _parent(self, path: str) -> None:
        if self.tree.names.get(os.path.dirname(path), 0) is not None:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)

    def listdir(self, path: str) -> list[str]:
        if self.tree.names.get(path, 0) is not None:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        front = path.rstrip("/") + "/"
        below = [name[len(front) :] for name in self.tree.names if name.startswith(front)]
        return [name for name in below if name and "/" not in name]

    def exists(self, path: str) -> bool:
        return path in self.tree.names

    def read(self, path: str, limit: int | None = None, start: int = 0) -> bytes:
        return self.tree.contents[self._file(path)][start : None if limit is None else start + limit]

    def size(self, path: str) -> int:
        return len(self.tree.contents[self._file(path)])

    def identity(self, path: str) -> tuple[int, int, int]:
        return (self._file(path), self.size(path), 0)

    def map(self, path: str) -> Any:
        return self.read(path)

    def create(self, path: str) -> int:
        self._create(path)
        return self.open_append(path)

    def write_file(self, path: str, data: bytes, *, sync: bool = True) -> None:
        self._create(path)
        fd = len(self._descriptors)
        self._descriptors[fd] = self._file(path)
        try:
            self.write(fd, data)
            if sync:
                self.fsync(fd)
        except OSError:
            self.unlink(path)
            raise

    def _create(self, path: str) -> None:
        self._parent(path)
        if path in self.tree.names:
            raise FileExistsError(errno.EEXIST, "exists", path)
        file, self._next = self._next, self._next + 1
        self.tree.contents[file] = b""
        self._do(Op("make", path, file))

    def _write(self, file: int, data: bytes) -> None:
        self.log.append(Op("write", file=file, data=data))
        self.tree.contents[file] += data

    def sync_file(self, path: str) -> None:
        self.log.append(Op("sync", file=self._file(path)))

    sync_old_epoch = sync_file

    def sync_dir(self, path: str) -> None:
        self.listdir(path)
        self.log.append(Op("syncdir", path))

    def link(self, source: str, target: str) -> None:
        self._parent(target)
        if target in self.tree.names:
            raise FileExistsError(errno.EEXIST, "exists", target)
        self._do(Op("make", target, self._file(source)))

    def rename(self, source: str, target: str) -> None:
        self._parent(target)
        if source not in self.tree.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", source)
        if self.tree.names.get(target, 0) is None and self.listdir(target):
            raise FileExistsError(errno.EEXIST, "exists", target)
        self._do(Op("move", target, source=source))

    def touch(self, path: str) -> None:
        if path not in self.tree.names:
            self._create(path)

    def unlink(self, path: str) -> None:
        if path in self.tree.names:
            self._do(Op("remove", path))

    def mkdir(self, path: str) -> None:
        self._parent(path)
        if path in self.tree.names:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._do(Op("make", path))

    def rmdir(self, path: str) -> None:
        if self.listdir(path):
            raise OSError(errno.ENOTEMPTY, "not empty", path)
        self._do(Op("remove", path))

    def open_append(self, path: str) -> int:
        self._descriptors[len(self._descriptors)] = self._file(path)
        return len(self._descriptors) - 1

    def try_lock(self, fd: int) -> bool:
        return True

    def write(self, fd: int, data: bytes | memoryview) -> None:
        self._write(self._descriptors[fd], bytes(data))

    def fdatasync(self, fd: int) -> None:
        self.log.append(Op("sync", file=self._descriptors[fd]))

    fsync = fdatasync

    def close(self, fd: int) -> None:
        pass


# After a power loss -------------------------------------------------------------------------------------------------


def states_after(start: Tree, log: Sequence[Op], seed: int = 0) -> Iterator[tuple[str, Tree]]:
    """Every state that a power loss after the last of `log` may leave, with what was lost in it."""
    moved = tuple(f"{op.source}/" for op in log if op.call == "move")
    unsure_names: list[int] = []
    unsure_data: dict[int, tuple[bytes, bytes]] = {}  # file to what is sure of it and what is not
    whole = dict(start.contents)
    for number, op in enumerate(log):
        if op.call == "write":
            assert op.file is not None
            whole[op.file] = whole.get(op.file, b"") + op.data
            sure, unsure = unsure_data.get(op.file, (start.contents.get(op.file, b""), b""))
            unsure_data[op.file] = (sure, unsure + op.data)
        elif op.call == "sync":
            assert op.file is not None
            unsure_data[op.file] = (whole.get(op.file, b""), b"")
        elif op.call == "syncdir":
            unsure_names = [n for n in unsure_names if os.path.dirname(log[n].path) != op.path]
        elif not _temporary(op.path) or op.path.startswith(moved):
            unsure_names.append(number)
    made = [op for op in log if op.call == "make" and op.file is not None]
    renamed = {op.source for op in log if op.call == "move"}
    named = {op.file for op in made if not _temporary(op.path) or op.path in renamed or op.path.startswith(moved)}
    named |= set(start.contents)
    torn = [file for file, (_, unsure) in unsure_data.items() if unsure and file in named]
    for lost in _choices(unsure_names, seed):
        for ends in itertools.product(range(4), repeat=len(torn)):
            tree = Tree(start.names, {})
            for number, op in enumerate(log):
                if op.call in ("make", "remove", "move") and number not in lost:
                    tree.apply(op)
            tree.contents = {file: b"" for file in named if file is not None} | dict(start.contents)
            tree.contents |= {file: data + unsure for file, (data, unsure) in unsure_data.items()}
            for file, end in zip(torn, ends, strict=True):
                sure, unsure = unsure_data[file]
                tree.contents[file] = sure + (b"", unsure, unsure[: len(unsure) // 2], b"\0" * len(unsure))[end]
            said = [f"{log[n].call} {log[n].path}" for n in sorted(lost)]
            yield f"lost names {said}, ends of unsynced files {ends}", tree


def _temporary(path: str) -> bool:
    return "/tmp/" in path


def _choices(unsure: Sequence[int], seed: int) -> Iterator[frozenset[int]]:
    """Sets of what is lost: all of them, or of many unsure things the likeliest and a sample."""
    if len(unsure) <= _MOST:
        for size in range(len(unsure) + 1):
            yield from map(frozenset, itertools.combinations(unsure, size))
        return
    for n in range(len(unsure) + 1):
        yield frozenset(unsure[n:])  # as a journal of the file system would lose them
        yield frozenset(unsure[:n])
    for one in unsure:
        yield frozenset((one,))
        yield frozenset(unsure) - {one}
    rng = random.Random(seed)
    for _ in range(200):
        yield frozenset(n for n in unsure if rng.random() < 0.5)
