"""The controller's upkeep of checkpoints: when a compaction is due, and the process of its own that does it.

Made by `controller`, which tells of runs that ended; starts `storage.compact_process` at the lowest priority and waits
for it in a thread that holds no lock: nothing of it stands in any run's way. Rules:

* A compaction is due `compact_after_s` after the first run that ended since the last one, after `ENDED_AT_ONCE` such
  runs, and once after the start, for what an earlier controller left. With a retention also every hour.
* One at a time; one that fails is tried again after a pause that grows to an hour, and logged once a time.

Faults: the controller is killed (the compaction goes on or is killed with it; the next one goes on), the process can't
be started, the disk is full, a person compacts at the same time.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pyworkflow_ray.runtime.messages import RuntimeConfig

log = logging.getLogger("pyworkflow_ray.controller")

ENDED_AT_ONCE: Final = 10_000
_HOUR_S: Final = 3600.0
_FIRST_PAUSE_S: Final = 10.0


class Schedule:
    """When a compaction is due. Pure: the clock is handed in."""

    def __init__(self, after_s: float, retains: bool, now: float) -> None:
        self._after_s = after_s
        self._retains = retains
        self._ended = 0
        self._since: float | None = now  # an earlier controller may have left something
        self._failures = 0
        self._not_before = now
        self._last = now

    def ended(self, now: float) -> None:
        """A run has ended."""
        self._ended += 1
        if self._since is None:
            self._since = now

    def due_at(self) -> float:
        """When the next compaction is due; infinity: not before another run ends."""
        if not self._after_s:
            return float("inf")
        due = float("inf") if self._since is None else self._since + self._after_s
        if self._ended >= ENDED_AT_ONCE:
            due = min(due, self._last)
        if self._retains:
            due = min(due, self._last + _HOUR_S)
        return max(due, self._not_before)

    def begun(self) -> None:
        """One begins: whoever ends from now on is for the next."""
        self._since, self._ended = None, 0

    def done(self, worked: bool, left: bool, now: float) -> None:
        """It has ended. left: runs that were too young are still in their journals, or slots of moved ones."""
        self._last = now
        self._failures = 0 if worked else self._failures + 1
        pause = 0.0 if worked else min(_HOUR_S, _FIRST_PAUSE_S * 2.0 ** (self._failures - 1))
        self._not_before = now + pause
        if (left or not worked) and self._since is None:
            self._since = now


class Upkeep:
    """See the module. `ended` may be called with any lock held: it takes one of its own for an instant."""

    def __init__(self, config: RuntimeConfig, start: Callable[[list[str]], Any] | None = None) -> None:
        self._config = config
        self._start = start or _start
        self._lock = threading.Condition()
        self._schedule = Schedule(config.compact_after_s, bool(config.retain), time.monotonic())
        if config.compact_after_s:
            threading.Thread(target=self._loop, name="upkeep", daemon=True).start()

    def ended(self) -> None:
        with self._lock:
            before = self._schedule.due_at()
            self._schedule.ended(time.monotonic())
            if self._schedule.due_at() < before:
                self._lock.notify()

    def _loop(self) -> None:
        while True:
            with self._lock:
                while (wait_s := self._schedule.due_at() - time.monotonic()) > 0:
                    self._lock.wait(min(wait_s, _HOUR_S))
                self._schedule.begun()
            worked, left = self._run()
            with self._lock:
                self._schedule.done(worked, left, time.monotonic())

    def _run(self) -> tuple[bool, bool]:
        """Whether it worked, and whether young runs are left, or slots that go later."""
        try:
            process = self._start([sys.executable, "-c", _CHILD, json.dumps(rules_of(self._config))])
            out, err = process.communicate()
            done = json.loads(out) if process.returncode == 0 else {}
        except (OSError, ValueError) as error:
            log.warning("compaction could not be run: %s", error)
            return False, True
        if process.returncode != 0:
            log.warning("compaction failed: %s", err.decode(errors="replace").strip()[-2000:])
            return False, True
        for run_id, why in done["damaged"]:
            log.error("run %s was left out of compaction: %s", run_id, why)
        if done["runs"] or done["dropped"] or done["live"]:
            log.info(
                "%d runs compacted, %d long ones in part, %d forgotten", done["runs"], done["live"], done["dropped"]
            )
        return True, bool(done["young"] or done["waiting"])


def rules_of(config: RuntimeConfig) -> dict[str, Any]:
    """What the process is told."""
    return {
        "storage": config.storage,
        "older_than_s": config.compact_after_s,
        "above_bytes": config.compact_above_bytes,
        "failed_after_s": config.compact_failed_after_s,
        "retain_s": dict(config.retain),
    }


_CHILD = "import os, sys; os.nice(19); from pyworkflow_ray.storage.compact_process import main; main(sys.argv[1])"


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
