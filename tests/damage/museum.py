"""Broken builds of the storage: what each does otherwise, as a change of one function's source, and what must find it.

An exhibit is a bug that there was, or a part of the protocol left out. `broken` makes that build in this process: it
rewrites the function and puts it wherever the package has imported it. The engine's, the fence's and the breakers'
exhibits stand in tests/simulation/test_mutants.py, tests/property/test_fence_model.py and test_breaker_mutants.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest


@dataclass(frozen=True)
class Exhibit:
    """where: "module:function" below pyworkflow_ray.storage, or a test's own disk. old, new: the change of its source.
    finder: "power SCENARIO", "fault SCENARIO MODE" or "files KIND PATH", what tests/damage does to find it.
    """

    name: str
    where: str
    old: str
    new: str
    finder: str


EXHIBITS: Final = [
    # Parts of the protocol left out
    Exhibit(
        "append acknowledged without a sync",
        "journal:Journal._commit",
        "disk.fdatasync(self._fd)",
        "pass",
        "power take over",
    ),
    Exhibit(
        "append acknowledged before it is written",
        "journal:Journal._commit",
        "disk.write(self._fd, data)",
        "pass",
        "power first epoch",
    ),
    Exhibit("run's file not synced", "storage:Storage._publish", "disk.sync_file(", "disk.exists(", "power create"),
    Exhibit(
        "run's directory not synced",
        "storage:Storage._publish",
        "disk.sync_dir(temporary[run_id])",
        "pass",
        "power create",
    ),
    Exhibit(
        "run's name not synced", "storage:Storage.create_runs", "self.disk.sync_dir(shard)", "pass", "power create many"
    ),
    Exhibit(
        "index entry not synced before the run is seen",
        "storage:Storage._publish",
        'disk.sync_dir(f"{self.root}/active")',
        "pass",
        "power create",
    ),
    Exhibit(
        "index entry of a resume not synced",
        "storage:Storage.activate",
        'self.disk.sync_dir(f"{self.root}/active")',
        "pass",
        "power resume",
    ),
    Exhibit(
        "new epoch's name not synced", "journal:_claim", "disk.sync_dir(place.directory)", "pass", "power take over"
    ),
    Exhibit(
        "fold's name not synced before its parts go",
        "journal:fold",
        "place.disk.sync_dir(place.directory)",
        "pass",
        "power fold",
    ),
    Exhibit(
        "blob not synced",
        "blobs:Blobs.put",
        "self._disk.write_file(temporary, data)",
        "self._disk.write_file(temporary, data, sync=False)",
        "power blob",
    ),
    Exhibit("blob's name not synced", "blobs:Blobs.put", "self._disk.sync_dir(directory)", "pass", "power blob"),
    Exhibit(
        "checkpoint's name not synced",
        "checkpoint_files:DiskFiles.publish",
        "disk.sync_dir(directory)",
        "pass",
        "power compact",
    ),
    Exhibit(
        "checkpoint not synced",
        "checkpoint_files:DiskFiles.publish",
        "disk.write_file(temporary, data)",
        "disk.write_file(temporary, data, sync=False)",
        "power compact",
    ),
    Exhibit(
        "journal used on after a failed sync",
        "journal:Journal._drop",
        'if self.state == "open":',
        'if self.state == "open" and state != "abandoned":',
        "fault take over EIO",
    ),
    Exhibit(
        "records' checks skipped",
        "record:decode_records",
        "if front != ",
        "if False and front != ",
        "files bit runs/24/live/0.journal",
    ),
    Exhibit(
        "headers' checks skipped",
        "record:decode_records",
        "if data[at + _CHECKED_BYTES : at + HEADER_BYTES] != check:",
        "if False:",
        "files bit runs/24/live/0.journal",
    ),
    Exhibit(
        "marks' checks skipped",
        "checked:decode_checked",
        "if data[:64] != _digest(place, body) or",
        "if False and",
        "files bit leases",
    ),
    Exhibit(
        "blobs' hashes skipped", "blobs:Blobs.get", "hexdigest() != digest", "hexdigest() == ''", "files bit blobs"
    ),
    # Bugs that there were
    Exhibit(
        "lost end of a run that had ended",
        "storage:Storage.read_run",
        "self._indexed_view(run_id)",
        "self._view(run_id)",
        "files stale runs/a4/done",
    ),
    Exhibit(
        "lost epoch of a resumed run",
        "storage:Storage._indexed_view",
        "self.index.has(run_id, newest + 1)",
        "False",
        "files removed runs/b4/again/1.journal",
    ),
    Exhibit(
        "lease without a file held for ever",
        "lease:lost_lease",
        "if lease_id in states.living or",
        "if True or",
        "files removed leases",
    ),
    Exhibit(
        "damaged mark held for ever",
        "lease:lost_lease",
        "if lease_id in states.damaged:",
        "if False:",
        "files bit leases",
    ),
    Exhibit(
        "interrupted append goes on",
        "journal:Journal._commit",
        "except BaseException:",
        "except MemoryError:",
        "fault take over interrupted",
    ),
    Exhibit(
        "full disk filled with temporary files",
        "disk:Disk.write_file",
        "self.unlink(path)",
        "pass",
        "real take over ENOSPC",
    ),
    Exhibit(
        "listing of a run raises OSError",
        "journal:_list",
        "raise disk_error(",
        "raise error or disk_error(",
        "fault take over EIO",
    ),
    Exhibit(
        "reading an owner raises OSError",
        "storage:Storage.owner",
        "contextlib.suppress(OSError)",
        "contextlib.suppress(FileNotFoundError)",
        "real recover EIO",
    ),
    Exhibit(
        "manifest's listing raises OSError",
        "checkpoint_manifest:_list",
        "raise StorageError(",
        "raise error or StorageError(",
        "fault take over EIO",
    ),
    Exhibit(
        "lease locked though making it failed",
        "lease:_make",
        "lease.close()\n            raise",
        "raise",
        "real lease EIO",
    ),
    Exhibit(
        "blob's temporary file left", "blobs:Blobs.put", "self._disk.unlink(temporary)\n", "pass\n", "fault blob ENOSPC"
    ),
    Exhibit(
        "taken lock of the compactor raises OSError",
        "compact:_exclusive",
        'raise disk_error("locking", lock, error) from error',
        "raise",
        "fault compact EIO",
    ),
]


def broken(patch: pytest.MonkeyPatch, exhibit: Exhibit) -> None:
    """Make the broken build; AssertionError where the source has changed and the exhibit must be made anew."""
    room, _, qualname = exhibit.where.partition(":")
    module = importlib.import_module(f"pyworkflow_ray.storage.{room}")
    holder, _, name = qualname.rpartition(".")
    owner: Any = getattr(module, holder) if holder else module
    original = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(original))
    assert exhibit.old in source, f"{exhibit.where} has no {exhibit.old!r} any more"
    made: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(exhibit.old, exhibit.new)
    exec(compile(code, f"<{exhibit.name}>", "exec"), vars(module), made)
    patch.setattr(owner, name, made[name])
    _put_everywhere(patch, module, name, original, made[name])


def _put_everywhere(patch: pytest.MonkeyPatch, home: Any, name: str, original: Any, made: Callable[..., Any]) -> None:
    for module in list(sys.modules.values()):
        inside = module is not home and getattr(module, "__name__", "").startswith("pyworkflow_ray.storage")
        if inside and vars(module).get(name) is original:
            patch.setattr(module, name, made)
