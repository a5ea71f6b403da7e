"""A circuit breaker's states over the restart of whoever holds them: one small file a breaker.

Called by the breaker's actor; calls `checked` and `disk`. The file carries a check of its content and of its name; it
is replaced as a whole, so a crash leaves the old one or the new one. The wall clock says how old a state is: a clock
that was set back makes it look younger, and the rest of an open time is clamped by its reader.

Faults: the file is damaged, or was written for another breaker: it is reported and the breaker begins closed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

from pyworkflow_ray.errors import CorruptJournalError
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.directory import ensure_directory
from pyworkflow_ray.storage.disk import Disk

log = logging.getLogger("pyworkflow_ray.storage")

DIRECTORY = "breakers"
VERSION = 1

States = list[tuple[str | None, dict[str, Any]]]  # key (None: the breaker itself) and what `Truth.save` gave


def states_file(name: str) -> str:
    """Name of the file of this breaker."""
    return hashlib.sha256(name.encode()).hexdigest()[:32] + ".json"


def encode_states(name: str, states: States, at: float) -> bytes:
    content = {"version": VERSION, "name": name, "saved_at": at, "states": [list(one) for one in states]}
    return encode_checked(f"{DIRECTORY}/{states_file(name)}", content)


def decode_states(name: str, data: bytes, path: str) -> tuple[States, float]:
    """States and when they were kept.

    Raises:
        CorruptJournalError: damaged, or another breaker's. KeyError, TypeError, ValueError: of a newer version.
    """
    content = decode_checked(f"{DIRECTORY}/{states_file(name)}", data, path)
    if content["version"] != VERSION:
        raise ValueError(f"written by a newer version ({content['version']})")
    return [(key, dict(state)) for key, state in content["states"]], float(content["saved_at"])


def kept_breakers(root: str, disk: Disk | None = None) -> list[tuple[str, States, float]]:
    """Every breaker of the storage: its name, its states and when they were kept. What can't be read is left out; its
    holder says so."""
    disk, directory = disk or Disk(), os.path.join(root, DIRECTORY)
    found = []
    for file in sorted(disk.listdir(directory)) if disk.exists(directory) else ():
        if file.endswith(".json"):
            path = os.path.join(directory, file)
            try:
                content = decode_checked(f"{DIRECTORY}/{file}", disk.read(path), path)
                states, at = decode_states(str(content["name"]), disk.read(path), path)
            except (CorruptJournalError, OSError, KeyError, TypeError, ValueError):
                continue
            found.append((str(content["name"]), states, at))
    return found


class BreakerStates:
    """The states of one breaker in one storage."""

    def __init__(self, root: str, name: str, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._name = name
        self._directory = os.path.join(root, DIRECTORY)
        self._file = states_file(name)
        self.path = os.path.join(self._directory, self._file)

    def save(self, states: States, at: float) -> None:
        """Replace what is kept, durably. at: UNIX time.

        Raises:
            OSError: the storage can't be written.
        """
        ensure_directory(self._disk, self._directory)
        temporary = f"{self.path}.{self._disk.token()}"
        self._disk.write_file(temporary, encode_states(self._name, states, at))
        self._disk.rename(temporary, self.path)
        self._disk.sync_dir(self._directory)

    def load(self) -> tuple[States, float] | None:
        """What was kept and when; None where nothing was, or it can't be read (which is logged)."""
        try:
            return decode_states(self._name, self._disk.read(self.path), self.path)
        except FileNotFoundError:
            return None
        except (CorruptJournalError, OSError, KeyError, TypeError, ValueError) as error:
            log.error("circuit breaker %r begins closed, its kept state can't be read: %s", self._name, error)
            return None
