"""`pw.health()`: is everything that runs need in order? Each thing is asked by itself, with a time limit of its own.

Called by users, `pyworkflow-ray health` and its HTTP server; asks the storage, and Ray through `runtime.vitals`. Rules:

* Nothing is started and nothing is mended. A process without Ray is connected to the one that runs, as by any call.
* Whatever hangs is reported and left behind in its thread: a stopped controller costs its limit, not the report.

Faults: all of those that it reports. A thread that hangs for good stays until the process ends.
"""

from __future__ import annotations

import datetime as dt
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from pyworkflow_ray import connection
from pyworkflow_ray.durations import Duration, format_duration, parse_duration
from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError
from pyworkflow_ray.health_checks import (
    RunsSeen,
    Silent,
    anchors_check,
    breakers_check,
    controller_check,
    pool_check,
    ray_check,
    runs_check,
    storage_check,
    timers_check,
)
from pyworkflow_ray.observability.health import Absent, Check, HealthReport

__all__ = ["HealthReport", "examine", "health"]

T = TypeVar("T")

# Seconds that each question may take. Connecting a process to Ray takes a second or two by itself.
LIMITS = {"ray": 15.0, "storage": 5.0, "runs": 10.0, "controller": 5.0, "anchors": 5.0, "pool": 5.0, "breakers": 5.0}
THREAD = "pyworkflow-health"  # name of the threads that ask
RUNS_READ = 1_000  # unfinished runs that one report reads, so that its cost does not grow with their number


def health(timeout: Duration | None = None) -> HealthReport:
    """Check all that runs need: Ray, controller, anchors, run actors, storage, stuck runs, timers, breakers.

    The storage is asked by a real write and fsync. Nothing is started; what hangs is reported, not waited for.

    Args:
        timeout: What each check may take. Default: 5 s, 10 s for reading unfinished runs, 15 s for connecting to Ray.

    Returns:
        A report: `.status` is "ok", "degraded" or "failing", `.checks` the checks with `.status`, `.why`, `.remedy`.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    return examine(None, None, None if timeout is None else parse_duration(timeout))


def examine(storage: str | os.PathLike[str] | None, address: str | None, timeout_s: float | None) -> HealthReport:
    """As `health`, of a storage and a cluster that need not be this process's."""
    began, at = time.monotonic(), dt.datetime.now(dt.UTC)
    limits = LIMITS if timeout_s is None else dict.fromkeys(LIMITS, timeout_s)
    root = _root(storage)
    address = address or connection.address()
    opened: _Asked[Any] = _Asked(lambda: _open(root), limits["storage"])
    probed = _Asked(lambda: _probe(root, opened), limits["storage"])
    seen = _Asked(lambda: _read_runs(opened, limits["runs"]), limits["runs"])
    cluster = _Asked(lambda: _vitals().ask_ray(address), limits["ray"])
    first = [ray_check(cluster.outcome(), cluster.took_s, address)]
    # The storage's own answer counts from here, whatever Ray took.
    storage_id = getattr(opened.outcome(), "storage_id", None)
    rest = _runtime_checks(cluster, storage_id, limits) if storage_id else _nothing_asked(opened.outcome())
    vitals, asked = rest
    checks = [
        *first,
        *asked,
        storage_check(probed.outcome(), probed.took_s, str(root)),
        runs_check(seen.outcome(), seen.took_s),
        timers_check(vitals, seen.outcome()),
    ]
    order = ("ray", "controller", "anchors", "pool", "storage", "runs", "timers", "breakers")
    checks.sort(key=lambda check: order.index(check.name))
    return HealthReport(at=at, storage=str(root), checks=checks, took_s=time.monotonic() - began)


def examine_ground(
    storage: str | os.PathLike[str] | None, address: str | None, timeout_s: float | None
) -> tuple[Check, Check]:
    """The two checks that need nothing of ours to be running: Ray, and the storage."""
    limits = LIMITS if timeout_s is None else dict.fromkeys(LIMITS, timeout_s)
    root = _root(storage)
    address = address or connection.address()
    opened: _Asked[Any] = _Asked(lambda: _open(root), limits["storage"])
    probed = _Asked(lambda: _probe(root, opened), limits["storage"])
    cluster = _Asked(lambda: _vitals().ask_ray(address), limits["ray"])
    written = storage_check(probed.outcome(), probed.took_s, str(root))
    return ray_check(cluster.outcome(), cluster.took_s, address), written


class _Asked(Generic[T]):
    """A question that is being answered in a thread of its own."""

    def __init__(self, ask: Callable[[], T], limit_s: float) -> None:
        self._answer: Future[T] = Future()
        self._began = time.monotonic()
        self._limit_s = limit_s
        self.took_s = limit_s
        threading.Thread(target=self._run, args=(ask,), name=THREAD, daemon=True).start()

    def _run(self, ask: Callable[[], T]) -> None:
        try:
            answer = ask()
        except BaseException as error:
            self.took_s = time.monotonic() - self._began
            self._answer.set_exception(error)
        else:
            self.took_s = time.monotonic() - self._began
            self._answer.set_result(answer)

    def outcome(self) -> T | BaseException:
        """The answer, or what was raised instead; `Silent` where it did not come in time."""
        left_s = max(0.0, self._began + self._limit_s - time.monotonic())
        try:
            return self._answer.result(left_s)
        except TimeoutError as error:
            if self._answer.done():
                return error  # its own
            return Silent(f"no answer within {format_duration(self._limit_s)}", self._limit_s)
        except BaseException as error:
            return error


def _vitals() -> Any:
    from pyworkflow_ray.runtime import vitals

    return vitals


def _runtime_checks(cluster: _Asked[Any], storage_id: str, limits: dict[str, float]) -> tuple[Any, list[Check]]:
    """What the controller said, and the checks of all that lives in Ray."""
    ray = cluster.outcome()
    if isinstance(ray, BaseException):
        return ray, _skipped("no Ray runs here" if isinstance(ray, Absent) else "Ray does not answer")
    ask = _vitals()
    # Ray's own limit is a little below ours: it tells what it waited for.
    told = _Asked(lambda: ask.ask_controller(storage_id, limits["controller"] * 0.9), limits["controller"])
    where = _Asked(lambda: ask.process_of(ask.controller_of(storage_id)), limits["controller"])
    anchors = _Asked(lambda: ask.ask_anchors(storage_id, limits["anchors"] * 0.9), limits["anchors"])
    breakers = _Asked(lambda: _breakers(limits["breakers"]), limits["breakers"])
    vitals, held = told.outcome(), anchors.outcome()
    checks = [controller_check(vitals, told.took_s, where.outcome()), anchors_check(held, anchors.took_s, vitals)]
    if isinstance(held, BaseException):
        checks.append(pool_check(vitals, held, 0.0))
    else:
        actors = _Asked(lambda: _actors(held.actors, limits["pool"] * 0.9), limits["pool"])
        checks.append(pool_check(vitals, actors.outcome(), actors.took_s))
    checks.append(breakers_check(breakers.outcome(), breakers.took_s))
    return vitals, checks


def _actors(actors: list[tuple[str, Any]], timeout_s: float) -> tuple[list[Any], list[str]]:
    doing, silent = _vitals().ask_actors(actors, timeout_s)
    return doing, [_vitals().process_of(handle) for handle in silent]


def _breakers(timeout_s: float) -> Any:
    from pyworkflow_ray.runtime import breaker_admin

    return breaker_admin.rows(answer_s=timeout_s * 0.9)


def _skipped(why: str) -> list[Check]:
    return [Check(name=name, status="skipped", why=why) for name in ("controller", "anchors", "pool", "breakers")]


def _nothing_asked(opened: Any) -> tuple[Any, list[Check]]:
    return opened, _skipped("there is no storage yet" if opened is None else "the storage can't be read")


# The storage ------------------------------------------------------------------------------------------------------


def _root(storage: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    client = None if storage is not None else connection.current_client()
    return client.storage.root if client is not None else connection.storage_setting(storage)


def _open(root: str | os.PathLike[str]) -> Any:
    """The storage, None where there is none yet."""
    from pyworkflow_ray.storage.directory import is_url
    from pyworkflow_ray.storage.port import open_storage

    if not is_url(root) and not os.path.exists(root):
        return None
    return open_storage(root, create=False)


def _probe(root: str | os.PathLike[str], opened: _Asked[Any]) -> Any:
    """A `Probe`; None where there is no storage yet, and could be one."""
    from pyworkflow_ray.storage.probe import probe_storage

    storage = opened.outcome()
    if isinstance(storage, BaseException):
        raise storage
    if storage is not None:
        return probe_storage(storage)
    parent = Path(root)
    while not parent.exists():
        parent = parent.parent
    try:  # made and removed again: mode bits say nothing of read-only mounts and of file systems that take nothing
        os.rmdir(tempfile.mkdtemp(prefix=".pyworkflow-ray-", dir=parent))
    except OSError as error:
        why = error.strerror or error
        raise ConfigurationError(
            f"storage={str(root)!r} does not exist, and can't be made in {parent}: {why}"
        ) from error
    return None


def _read_runs(opened: _Asked[Any], limit_s: float) -> RunsSeen:
    """The unfinished runs, explained; as many as can be read in the time."""
    from pyworkflow_ray.handle import RunHandle

    until = time.monotonic() + limit_s * 0.8
    storage = opened.outcome()
    if isinstance(storage, BaseException):
        raise storage
    if storage is None:
        return RunsSeen()
    ids = storage.unfinished()
    seen = RunsSeen(total=len(ids))
    for run_id in ids[:RUNS_READ]:
        if time.monotonic() > until:
            break
        try:
            seen.views.append(RunHandle[Any](run_id, storage).explain())
        except (PyWorkflowError, ValueError) as error:
            seen.damaged[run_id] = str(error)
    return seen
