"""The storage that a command reads from. Called by the commands; calls `pyworkflow_ray.reading`, which has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyworkflow_ray.cli.options import StorageName, storage_root
from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.reading import Filter, Listed, Reader, named

if TYPE_CHECKING:
    import datetime as dt

__all__ = ["Filter", "Listed", "Reader", "named", "open_reader"]


def open_reader(given: StorageName | None, zone: dt.tzinfo) -> Reader:
    """The storage of a command. Where the default one does not exist yet there are no runs.

    Raises:
        StorageError: `--storage` names a directory that is no storage.
    """
    from pyworkflow_ray.storage.port import open_storage

    root = storage_root(given)
    if isinstance(root, Path) and not root.exists():
        if given is not None:
            raise StorageError(f"no storage at {root}: the directory does not exist", path=str(root))
        return Reader(None, root, zone)
    return Reader(open_storage(root, create=False), root, zone)
