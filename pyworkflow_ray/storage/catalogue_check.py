"""The catalogue held against the truth: all of it read, and compared with what lies in journals and checkpoints.

Called by `storage verify`, which reports, and by the controller's upkeep, which makes a wrong one anew; calls
`catalogue`, `stocktaking` and the storage. Rules:

* A catalogue is derived, and each answer checks what it reads. What an answer can't see is a row that is not there:
  about one flipped bit in a hundred hides one. That is found here.
* Runs end, go on and are compacted meanwhile: what looks wrong is looked at again before it is told.

Faults: any damage, another process that makes the catalogue anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Final

from pyworkflow_ray.errors import RunNotFoundError, StorageError
from pyworkflow_ray.storage.catalogue import Catalogue, DamagedCatalogue
from pyworkflow_ray.storage.stocktaking import catalogue_path, checkpoints, rebuild, run_files

if TYPE_CHECKING:
    from pyworkflow_ray.storage.storage import Storage

logger = logging.getLogger(__name__)

_EVERY_S: Final = 86_400.0
_TOLD: Final = 20  # of runs that are missing; one rebuilding brings them all


def check(storage: Storage) -> list[str]:
    """What is wrong with the catalogue; nothing where there is none, for it is made anew.

    Raises:
        StorageError: a checkpoint is damaged, or the storage can't be read.
    """
    try:
        found = _look(storage)
        return _look(storage) if found else []  # a run that moved between our looks has arrived now
    except DamagedCatalogue as error:
        return [str(error)]
    except sqlite3.Error as error:
        return [f"it can't be read: {error}"]


def _look(storage: Storage) -> list[str]:
    # In the order of a listing, so that a run that moves on is met at least once.
    directories = storage.run_directories()
    elsewhere = storage.index.run_ids()
    elsewhere.update(run_id for run_id, _ in storage.index.ended())
    compacted = checkpoints(storage)
    catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id)
    if catalogue is None:
        return []
    with contextlib.closing(catalogue):
        found = catalogue.damage()
        elsewhere |= catalogue.damaged().keys()
        parts, files = catalogue.parts(), run_files(compacted)
        for path in sorted(parts.keys() & files.keys()):
            held = catalogue.runs_of(parts[path])
            if held != files[path].rows:
                found.append(f"it has {held} runs of {path}, which holds {files[path].rows}")
        journals = set(catalogue.in_journals())
        if parts.keys() == files.keys():  # else it is taken in by the next listing
            missing = [run_id for run_id in directories if run_id not in elsewhere and run_id not in journals]
            missing = [run_id for run_id in missing if catalogue.run(run_id) is None and _is_there(storage, run_id)]
            found += [f"run {run_id!r} is missing from it" for run_id in missing[:_TOLD]]
    return found


def _is_there(storage: Storage, run_id: str) -> bool:
    try:
        return storage.read_run(run_id).finished
    except RunNotFoundError:
        return False
    except StorageError:
        return True


def lost_runs(storage: Storage) -> list[str]:
    """Ended runs that the catalogue knows and whose directory is gone, though no checkpoint holds them."""
    try:
        catalogue = Catalogue.open(catalogue_path(storage), storage.storage_id)
        if catalogue is None:
            return []
        with contextlib.closing(catalogue):
            known = catalogue.in_journals()
    except (DamagedCatalogue, sqlite3.Error):
        return []  # `check` tells
    gone = set(known).difference(storage.run_directories())
    noted = {run_id for run_id, _ in storage.index.ended()} | storage.index.run_ids()
    return sorted(run_id for run_id in gone - noted if not storage.is_retired(run_id))


def keep_right(storage: Storage) -> None:
    """Check the catalogue once a day, and make it anew where it is wrong."""
    mark = f"{os.path.dirname(catalogue_path(storage))}/checked"
    try:
        if time.time() - os.stat(mark).st_mtime < _EVERY_S:
            return
    except FileNotFoundError:
        pass
    found = check(storage)
    if found:
        logger.warning("the catalogue of %s is made anew: %s", storage.root, "; ".join(found))
        rebuild(storage)
    with contextlib.suppress(OSError):
        storage.disk.unlink(mark)
        storage.disk.touch(mark)
