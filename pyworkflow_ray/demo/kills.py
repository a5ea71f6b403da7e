"""Whom the demo kills, and the proof that they died.

Called by `main`; calls the events' types and the operating system. `choose` and `working` are pure. A process is killed
only if it is on this machine and its title says that it is a worker of Ray; it is held by a pidfd from before the look
at its title until after its death, so a number that the system gave to another process meanwhile is never hit. It is
stopped before the last look at its work: on a slow machine a step may end between the look and the blow.

Faults: a process that has ended by itself, or does not end in time, is a Kill with `gone=False`; nothing is raised.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pyworkflow_ray.demo.tally import Kill, Role, pid_of
from pyworkflow_ray.engine.events import (
    TERMINAL,
    Event,
    RunActivated,
    RunParked,
    RunPaused,
    StepCompleted,
    StepFailed,
    StepLost,
    StepScheduled,
    StepStarted,
)

DEATH_S = 5.0


def choose(role: Role, histories: Iterable[Sequence[Event]], spared: frozenset[int] = frozenset()) -> int | None:
    """The pid of a process in the middle of its work, by the event log: of all, the one that began last.

    run actor: owner of a run with a step under way. step worker: a worker that began a step and has not ended it.
    `spared` are not chosen (those killed before). None where nobody is in the middle of anything.
    """
    return next((pid for _, pid in sorted(working(role, histories), reverse=True) if pid not in spared), None)


def working(role: Role, histories: Iterable[Sequence[Event]]) -> list[tuple[float, int]]:
    """Since when, and the pid, of every process of this role that is in the middle of its work, by the event log."""
    candidates: list[tuple[float, int]] = []
    for history in histories:
        if history and isinstance(history[-1], (*TERMINAL, RunParked, RunPaused)):
            continue
        owner: int | None = None
        scheduled: set[str] = set()
        started: dict[str, tuple[float, int | None]] = {}
        for event in history:
            if isinstance(event, RunActivated):
                owner = pid_of(event.worker)
            elif isinstance(event, StepScheduled):
                scheduled.add(event.position)
            elif isinstance(event, StepStarted):
                started[event.position] = (event.started_at, pid_of(event.worker))
            elif isinstance(event, (StepCompleted, StepFailed)):
                scheduled.discard(event.position)
                started.pop(event.position, None)
            elif isinstance(event, StepLost):
                started.pop(event.position, None)
        if role == "run actor" and owner is not None and scheduled:
            candidates.append((history[-1].at, owner))
        elif role == "step worker":
            candidates.extend((at, pid) for at, pid in started.values() if pid is not None and pid != owner)
    return candidates


def strike(role: Role, pid: int, *, still: Callable[[], bool] = lambda: True, death_s: float = DEATH_S) -> Kill | None:
    """SIGKILL a worker of Ray, and wait at most `death_s` seconds until it is gone.

    `still` is asked once it is stopped: where it says no, the process goes on, and None is returned.
    """
    at = time.time()
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return Kill(role, pid, at, gone=False)
    try:
        if not _title(pid).startswith("ray::"):
            return Kill(role, pid, at, gone=False)
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        struck = False
        try:
            struck = still()
        finally:
            signal.pidfd_send_signal(handle, signal.SIGKILL if struck else signal.SIGCONT)
        if not struck:
            return None
        ended, _, _ = select.select([handle], [], [], death_s)
        return Kill(role, pid, at, gone=bool(ended))
    except ProcessLookupError:
        return Kill(role, pid, at, gone=False)
    finally:
        os.close(handle)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""


def descendant(name: str) -> int | None:
    """The pid of an actor whose class is called `name` (in any case), among the processes that descend from this one.

    The controller is found so: its death leaves no trace in the log of any run. Only Ray that the demo itself started
    descends from it, so no other cluster's controller is ever named. None where there is none at the moment.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # "pid (comm) state ppid …": comm may hold spaces and brackets, so read from the last one.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    for pid in sorted(parents):
        actor = _title(pid).removeprefix("ray::").partition(".")[0].partition(":")[0]
        if actor.lower() == name.lower() and _descends(pid, os.getpid(), parents):
            return pid
    return None


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False
