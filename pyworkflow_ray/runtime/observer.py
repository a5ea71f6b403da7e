"""The controller's side of the observer process: starts it where it is wanted, tells it of runs, starts it again.

Made by `controller`; starts `observing`. Where nothing is asked for there is no process and `tell` returns at once.
Threads: one writes to the process and waits for its end. Fault: the process dies: another goes on from what is durable.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pyworkflow_ray.observability.otel_settings import signals
from pyworkflow_ray.runtime.messages import RuntimeConfig
from pyworkflow_ray.runtime.observer_state import CALLBACKS

log = logging.getLogger("pyworkflow_ray.controller")

_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_LASTED_S = 60.0  # one that lasted so long is started again at once
_END_S = 12.0

_CHILD = "import os; os.nice(10); from pyworkflow_ray.runtime.observing import main; main()"


def is_wanted(config: RuntimeConfig) -> bool:
    """Whether anything is to be observed of this storage."""
    if "://" in config.storage:
        return False
    called = os.path.exists(os.path.join(config.storage, CALLBACKS))  # a run of an earlier controller has callbacks
    return called or config.alert_webhook is not None or bool(signals(dict(config.telemetry)))


class ObserverProcess:
    """See the module. `tell` may be called with any lock held."""

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._unsent: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._child: subprocess.Popen[str] | None = None
        self._ending = threading.Event()
        self._started = threading.Lock()
        if is_wanted(config):
            self.start()
        elif "://" in config.storage and signals(dict(config.telemetry)):
            log.warning("runs in a bucket are not exported as they go on: see `pyworkflow-ray runs trace RUN --export`")

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Have the process; harmless when there is one."""
        with self._started:
            if self._thread is None and not self._ending.is_set():
                self._thread = threading.Thread(target=self._loop, name="observer", daemon=True)
                self._thread.start()

    def called(self) -> None:
        """Runs have callbacks for alerts: have the process, now and after a restart."""
        if "://" in self._config.storage:
            return
        path = os.path.join(self._config.storage, CALLBACKS)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            Path(path).touch()
        self.start()

    def tell(self, *run_ids: str) -> None:
        """Something happened to these runs."""
        if self._thread is not None:
            self._lines.put({"runs": run_ids})

    def say(self, line: dict[str, Any]) -> None:
        if self._thread is not None:
            self._lines.put(line)

    def end(self) -> None:
        """Let it tell what is left; waits for that."""
        self._ending.set()
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(_END_S)

    def _loop(self) -> None:
        pause_s = 0.0
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                self._child = _start()
                self._feed(self._child)
                code = self._child.wait()
            except OSError as error:
                code = -1
                log.warning("the observer process can't be started: %s", error)
            if self._ending.is_set():
                return
            pause_s = 0.0 if time.monotonic() - began > _LASTED_S else min(_LONGEST_PAUSE_S, pause_s * 2 + _PAUSE_S)
            log.warning("the observer process ended (%s) and is started again; nothing is lost", code)
            time.sleep(pause_s)

    def _feed(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        about = {
            "storage": self._config.storage,
            "telemetry": dict(self._config.telemetry),
            "webhook": self._config.alert_webhook,
            "struggling_after": self._config.alert_struggling_after,
            "codec": self._config.codec,
            "allow_pickle": self._config.allow_pickle,
        }
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(about) + "\n")
            child.stdin.flush()
            while True:
                self._unsent = self._unsent or self._next(child)  # one that its predecessor did not get comes first
                if self._unsent is None:
                    break
                child.stdin.write(json.dumps(self._unsent) + "\n")
                child.stdin.flush()
                self._unsent = None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()

    def _next(self, child: subprocess.Popen[str]) -> dict[str, Any] | None:
        """The next line; None: at the end, ours or its."""
        while child.poll() is None:
            try:
                return self._lines.get(timeout=1.0)
            except queue.Empty:
                continue
        return None


def _start() -> subprocess.Popen[str]:
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, text=True, env=env)
