"""A disk that is really full, and a sync that the kernel really fails: in processes of their own, with what each was
told noted beside the storage.

Where no file system can be mounted, a limit of the file's size takes the small disk's place; where there is no strace,
the process fails its own os.fdatasync. Either way the test is run, and the reason it holds is the same.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyworkflow_ray.storage.storage import Storage
from tests.journals import make_run, names

ROOT = Path(__file__).resolve().parents[2]

APPEND = """
import errno, os, resource, sys
from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.storage.storage import Storage
from tests.journals import fired
fault, small = sys.argv[3], int(sys.argv[4])
storage = Storage.open(sys.argv[1])
ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
journal, events = storage.activate("run", "")
if small:
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))
if fault == "by itself":
    synced = os.fdatasync
    left = [3]
    def fdatasync(fd):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EIO, "Input/output error")
        synced(fd)
    os.fdatasync = fdatasync
seq = len(events)
try:
    for seq in range(len(events), 100_000):
        journal.append([fired(seq, "x" * 4000 if fault == "full" else "x")]).result()
        os.write(ledger, f"{seq}\\n".encode())
except StorageError as error:
    os.write(ledger, f"refused: {error}\\n".encode())
    try:
        journal.append([fired(seq)]).result()
        os.write(ledger, b"acknowledged after the failure\\n")
    except StorageError:
        pass
    sys.exit(3)
"""


def append(storage: Storage, ledger: Path, fault: str, small: int = 0, wrapper: list[str] | None = None) -> list[str]:
    done = subprocess.run(
        [*(wrapper or []), sys.executable, "-c", APPEND, storage.root, str(ledger), fault, str(small)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    return ledger.read_text().splitlines()


def check(storage: Storage, lines: list[str], text: str) -> None:
    """Refused once and clearly, nothing acknowledged after it, all that was is there, and the run goes on."""
    assert text in lines[-1], lines[-1]
    acknowledged = [int(line) for line in lines[:-1]]
    assert acknowledged
    history = storage.read_run("run")
    assert acknowledged == list(range(2, 2 + len(acknowledged)))
    assert len(history.events) >= 2 + len(acknowledged)
    journal, events = storage.activate("run", "")
    journal.append([history.events[1].model_copy(update={"seq": len(events)})]).result()
    journal.close()
    assert len(names(storage.read_run("run").events)) == len(events) + 1


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[int]:
    """A file system of 1 MB at `directory`; where none can be mounted, the largest file that counts as room."""
    directory.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m,nr_inodes=4k", "none", str(directory)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        yield 200_000
        return
    try:
        yield 0
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_refused_clearly_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as largest:
        storage = Storage.open(tmp_path / "disk" / "s")
        make_run(storage, events=1)
        ballast = tmp_path / "disk" / "ballast"
        ballast.write_bytes(b"x" * 100_000)
        lines = append(storage, tmp_path / "ledger", "full", largest)
        assert os.listdir(Path(storage.root, "tmp")) == []
        if not largest:  # full still: a take-over is refused as clearly, and leaves nothing
            with pytest.raises(Exception, match="No space left on device"):
                fill(storage)
            assert os.listdir(Path(storage.root, "tmp")) == []
        ballast.unlink()
        check(storage, lines, "File too large" if largest else "No space left on device")


def fill(storage: Storage) -> None:
    """Take the run over until the disk has no room for another epoch."""
    for _ in range(1_000):
        storage.activate("run", "")[0].close()


def test_after_a_sync_that_failed_nothing_is_acknowledged(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path / "s")
    make_run(storage, events=1)
    strace = shutil.which("strace")
    inject = ["-f", "-qq", "-o", str(tmp_path / "trace"), "-e", "trace=fdatasync"]
    failing = [] if strace is None else [strace, *inject, "-e", "inject=fdatasync:error=EIO:when=6"]
    lines = append(storage, tmp_path / "ledger", "by itself" if strace is None else "by the kernel", wrapper=failing)
    check(storage, lines, "Input/output error")
    if strace is not None:
        assert (tmp_path / "trace").read_text().count("INJECTED") == 1
