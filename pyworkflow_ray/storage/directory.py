"""The directories of a storage: made once, durable before anybody can find them, and refused where others' files lie.

Called by `storage`; calls `disk` and `checked`. Faults: a crash half-way (the next maker goes on), several makers at
once (one id wins), a copy that lost its empty directories (they are made again when they are needed).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyworkflow_ray.errors import ConfigurationError, CorruptJournalError
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.storage.checked import encode_checked
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.record import FORMAT_VERSION

STORAGE_FILE: Final = "storage.json"
DIRECTORIES: Final = ("active", "ended", "runs", "blobs", "leases", "tmp")


_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has made one slash of two; C:/ is none


def is_url(storage: str | os.PathLike[str]) -> bool:
    """Whether a storage is named by a URL and not by a path."""
    return isinstance(storage, str) and "://" in storage


def place_of(storage: str | os.PathLike[str]) -> Path | str:
    """A storage as a person names it: an absolute path, or the URL of an object store as text.

    Raises:
        ConfigurationError: it is a URL that has become a path.
    """
    return str(storage).rstrip("/") if is_url(storage) else Path(directory_of(storage))


def directory_of(path: str | os.PathLike[str]) -> str:
    """The absolute path of a storage directory, `~` expanded. Called by whatever takes one from a person.

    Raises:
        ConfigurationError: it is a URL, of which a directory of that name would be made unnoticed.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise ConfigurationError(
            f"storage={text!r} looks like a URL that has been made a path: give it as text, such as 's3://bucket/prefix'"
        )
    return os.path.abspath(os.path.expanduser(text))


def listing(disk: Disk, path: str) -> list[str]:
    try:
        return disk.listdir(path)
    except FileNotFoundError:
        return []  # a copy of the storage may leave out empty directories


def ensure_directory(disk: Disk, path: str) -> None:
    """Make a directory whose name is durable before anything in it is acknowledged."""
    if not disk.exists(path):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        disk.sync_dir(os.path.dirname(path))


def _missing_ancestors(root: str) -> Iterator[str]:
    path = root
    while not os.path.isdir(path):
        yield path
        path = os.path.dirname(path)


def _make_directories(root: str, disk: Disk) -> None:
    """All that runs are made in, durable before the storage can be found, so that making a run syncs no more of it."""
    paths = [f"{root}/{name}" for name in DIRECTORIES] + [f"{root}/runs/{shard:02x}" for shard in range(256)]
    for path in paths:
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
    disk.sync_dir(f"{root}/runs")
    disk.sync_dir(root)


def refuse_headless(root: str, disk: Disk) -> None:
    """Raise CorruptJournalError where runs lie in `root`, for `storage.json` was there before the first of them."""
    if any(listing(disk, f"{root}/runs/{shard}") for shard in listing(disk, f"{root}/runs")):
        path = f"{root}/{STORAGE_FILE}"
        raise CorruptJournalError(f"{path} is missing from a storage that holds runs: restore it", path=path)


def make_storage(root: str, disk: Disk) -> None:
    """Make a storage in a directory that is missing or empty. Of several makers one wins, and all find its id."""
    if os.path.lexists(root) and not os.path.isdir(root):
        raise ConfigurationError(f"storage={root!r} is no directory")
    for path in reversed(list(_missing_ancestors(root))):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(path)
        disk.sync_dir(os.path.dirname(path))
    names = [name for name in disk.listdir(root) if not name.startswith(f".{STORAGE_FILE}.")]
    if STORAGE_FILE in names:
        return
    # First what is worse: beside the runs of a storage that lost its storage.json other files (checkpoints) may lie.
    refuse_headless(root, disk)
    others = sorted(set(names) - set(DIRECTORIES))
    if others:
        raise ConfigurationError(
            f"storage={root!r} holds other files ({others[0]!r}): give a directory that is empty or missing"
        )
    _make_directories(root, disk)
    temporary = f"{root}/.{STORAGE_FILE}.{disk.token()}"
    content = {"kind": "pyworkflow-ray storage", "format": FORMAT_VERSION, "storage_id": new_id()}
    disk.write_file(temporary, encode_checked(STORAGE_FILE, content))
    try:
        disk.link(temporary, f"{root}/{STORAGE_FILE}")
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP):
            raise ConfigurationError(f"storage={root!r}: its file system has no hard links, use a local disk") from None
        if not isinstance(error, FileExistsError):
            raise
    finally:
        disk.unlink(temporary)
    disk.sync_dir(root)
