"""Ray clusters of the tests' own: started by Ray's command line as a person does, ended by process id.

The test process is never a driver: drivers are scripts and jobs, so that each has its own folder, code and end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = float(os.environ.get("PATIENCE_S", "90"))  # a bound on waiting, never a measure
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def until(look: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + patience_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {patience_s:.0f} s in vain until {what}")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of every process of the tests: this checkout's package, and nothing of the developer's own Ray or storage."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYWORKFLOW_")) and k != "PYTHONPATH"}
    return {**kept, **QUIET, "PYTHONPATH": str(ROOT), **(more or {})}


@dataclass
class Head:
    """A running head. address: for drivers; jobs: of its job server, where it has one."""

    address: str
    jobs: str
    temp: str
    process: subprocess.Popen[bytes]
    pids: set[int] = field(default_factory=set)

    def note_processes(self) -> None:
        """Remember what runs below it: to be ended with it, whoever its parent is by then."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.pids.add(process.pid)

    def kill(self) -> None:
        """SIGKILL of everything of this cluster: a power cut of its machine."""
        if self.process.poll() is None:
            self.note_processes()
            self.process.kill()
            self.process.wait()
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if "ray" in " ".join(psutil.Process(pid).cmdline()):
                    os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(lives, self.pids)), "the cluster is gone")


@contextlib.contextmanager
def head(*, cpus: int = 2, dashboard: bool = False, more: Mapping[str, str] | None = None) -> Iterator[Head]:
    """A cluster of one node, until the end of the block."""
    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")  # short: a socket's path has 107 characters
    gcs, web, agent = free_ports(3)
    command = [
        os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block", f"--port={gcs}",
        "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={temp}", "--object-store-memory=100000000",
        f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-port={web}",
        f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
    ]  # fmt: skip
    with open(f"{temp}/out", "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(more), cwd=temp)
    running = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{web}", temp, process)
    try:
        until(lambda: process.poll() is not None or "Ray runtime started" in said(temp), "Ray has started")
        assert process.poll() is None, said(temp)
        until(lambda: not dashboard or answers(web), "the job server listens")
        yield running
    finally:
        running.kill()
        shutil.rmtree(temp, ignore_errors=True)


def said(temp: str) -> str:
    return Path(f"{temp}/out").read_text(errors="replace")


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone: a test counts only if its fault struck."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        until(lambda: not lives(pid), f"process {pid} is gone")
    finally:
        os.close(handle)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def drive(
    folder: Path, source: str, *, address: str, storage: Path, more: Mapping[str, str] | None = None, timeout: int = 120
) -> str:
    """Run `source` as a driver's script in `folder`; what it printed. Its folder is its import path."""
    script = folder / "drive.py"
    script.write_text(source)
    settings = {"RAY_ADDRESS": address, "PYWORKFLOW_STORAGE": str(storage), **(more or {})}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment(settings), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()
