"""Whether this process's code is still what its files hold; where it is not, it is forgotten and imported anew.

Run actors and step workers are warm: they outlive the driver that brought them, and the next one may have edited its
folder meanwhile. Called by the runtime before it loads code of a run (`refresh`) and after (`note`). Rules:

* A folder is what it is now, a package (`working_dir` of a job) what it was: only files can change under a process.
* One changed file has all of the user's modules forgotten, so that no new one meets an old one. A package with compiled
  extensions stays: such can't be imported twice in a process.
* Only between runs, never while user code runs. A file that is gone changes nothing: what is loaded goes on.

Faults: a file is being written at this instant (its import fails, and the run that needs it says so).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pyworkflow_ray.execution.code import forget
from pyworkflow_ray.execution.environment import import_roots, own_directories

log = logging.getLogger("pyworkflow_ray.code")

LOOK_S = 0.1  # no two looks at the files within so long: an edit takes longer to become a run
_OURS = ("pyworkflow_ray", "ray")
_Stamp = tuple[int, int, int]  # time of modification (ns), size, inode
_UNSURE: _Stamp = (-1, -1, -1)  # equal to none: the module is imported anew at the next look


class Freshness:
    """Of one process. Thread-safe. `forgotten` is called with the names of the modules that were dropped."""

    def __init__(self, forgotten: Callable[[set[str]], None] = forget) -> None:
        self._lock = threading.Lock()
        self._forgotten = forgotten
        self._stamps: dict[str, tuple[str, _Stamp]] = {}
        self._modules = 0
        self._noted_ns = time.time_ns()
        self._looked_at = -LOOK_S
        self._own = own_directories()

    def refresh(self) -> list[str]:
        """Forget the user's modules if the file of one has changed. Returns the names of the changed ones."""
        with self._lock:
            now = time.monotonic()
            if now < self._looked_at + LOOK_S:
                return []
            self._looked_at = now
            self._note_locked()
            changed = [name for name, (path, stamp) in self._stamps.items() if _stamp(path) not in (None, stamp)]
            if changed:
                self._forget_locked()
                log.info("code has changed on disk and is loaded anew: %s", ", ".join(sorted(changed)[:5]))
            return changed

    def note(self) -> None:
        """Remember the files of what has been imported since."""
        with self._lock:
            self._note_locked()

    def _note_locked(self) -> None:
        if len(sys.modules) == self._modules:
            return
        since, self._noted_ns = self._noted_ns, time.time_ns()
        for name, path in self._users():
            stamp = _stamp(path)
            if name not in self._stamps and stamp is not None:
                # Imported since the last note. A file as young as that may have been edited after its import.
                self._stamps[name] = (path, _UNSURE if stamp[0] >= since else stamp)
        self._modules = len(sys.modules)

    def _users(self) -> Iterator[tuple[str, str]]:
        """Modules of the user that are Python source: name and file."""
        roots = tuple(f"{root}{os.sep}" for root in import_roots())
        own = tuple(f"{path}{os.sep}" for path in self._own)
        found: list[tuple[str, str]] = []
        compiled = set(_OURS)
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if not isinstance(path, str) or name == "__main__":
                continue
            real = os.path.realpath(path)
            if real.startswith(roots) and not real.startswith(own):
                found.append((name, real))
                if not real.endswith(".py"):
                    compiled.add(name.partition(".")[0])
        return ((name, path) for name, path in found if name.partition(".")[0] not in compiled)

    def _forget_locked(self) -> None:
        names = {name for name, _ in self._users()}
        for name in names:
            sys.modules.pop(name, None)
        self._stamps.clear()
        self._modules = 0
        importlib.invalidate_caches()
        self._forgotten(names)


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_of_this_process = Freshness()


def refresh() -> list[str]:
    """`Freshness.refresh` of this process."""
    return _of_this_process.refresh()


def note() -> None:
    """`Freshness.note` of this process."""
    _of_this_process.note()
