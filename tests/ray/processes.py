"""Real processes of the tests: who they are, killing them, the proof that they died. Nothing else is ever killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
PATIENCE_S = 60.0  # a bound on waiting, never a measure


def until(look: Callable[[], T], what: str, patience_s: float = PATIENCE_S) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + patience_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {patience_s:.0f} s in vain until {what}")
        time.sleep(0.005)


def controller_pid() -> int:
    """The controller of the storage that this process is connected to; a cluster has one for each storage."""
    import pyworkflow_ray as pw

    return int(until(lambda: pw.health()["controller"].details.get("pid"), "the controller answers"))


def descendants(title: str = "", root: int | None = None) -> list[int]:
    """Living processes that descend from this one (or `root`) and carry `title`."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and title in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone: a test counts only if its fault struck."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        until(lambda: not lives(pid), f"process {pid} is gone")
    finally:
        os.close(handle)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(pids: list[int]) -> None:
    """End what a killed driver left behind: only these, by number, and only while they are still Ray's."""
    for pid in pids:
        try:
            if "ray" in " ".join(psutil.Process(pid).cmdline()):
                os.kill(pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
