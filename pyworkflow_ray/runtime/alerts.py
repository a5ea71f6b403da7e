"""Delivers alerts, in a thread of the observer process: by a webhook, and to callbacks in processes of their own.

Made by `observing`; `observer_state` holds what is to be delivered. Rules:

* an alert is forgotten when it was taken: by an answer of 2xx, or by a callback that returned. Until then it is tried
  again after 1 s, 2 s, 4 s ... an hour, for `GIVE_UP_S` since it happened. So each is delivered at least once, with its
  id;
* callbacks run in a process with the run's import roots, which gets `CALL_S`: what hangs or dies there harms nothing.

Faults: SIGKILL of this process between an answer and its note (the alert is delivered again); a webhook that is away
or refuses; a callback that can't be loaded, raises, hangs or kills its process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyworkflow_ray.runtime.observer_state import State

log = logging.getLogger("pyworkflow_ray.observer")

ANSWER_S = 10.0
CALL_S = 60.0
GIVE_UP_S = 3 * 86400.0
_LONGEST_PAUSE_S = 3600.0
_LOOK_S = 1.0

WEBHOOK, CALLBACK = "webhook", "callback"


class Deliverer:
    """See the module. `calling`: the storage, codec and allow_pickle that a callback's process is told."""

    def __init__(self, state: State, calling: dict[str, Any], webhook: str | None) -> None:
        self._state = state
        self._calling = calling
        self._webhook = webhook
        self._wake = threading.Event()
        self._said: set[str] = set()
        threading.Thread(target=self._loop, name="deliver-alerts", daemon=True).start()

    def look(self) -> None:
        """There is something to deliver."""
        self._wake.set()

    def flush(self, timeout_s: float) -> None:
        """Wait until everything that is due was tried."""
        self.look()
        deadline = time.monotonic() + timeout_s
        while self._state.due_alerts(time.time(), limit=1) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _loop(self) -> None:
        while True:
            try:
                if not self.deliver_due():
                    self._wake.wait(_LOOK_S)
                    self._wake.clear()
            except Exception:
                log.exception("delivering alerts failed; going on")
                self._wake.wait(_LOOK_S)

    def deliver_due(self) -> int:
        """Deliver what is due; how many there were."""
        due = self._state.due_alerts(time.time())
        for alert_id, sink, body, tries in due:
            try:
                if sink == WEBHOOK:
                    self._post(body)
                else:
                    self._call(body)
            except Exception as error:
                self._failed(alert_id, sink, body, tries, error)
                continue
            self._state.delivered(alert_id, sink)
            if sink in self._said:
                self._said.discard(sink)
                log.warning("alerts are delivered again by %s", sink)
        return len(due)

    def _failed(self, alert_id: str, sink: str, body: dict[str, Any], tries: int, error: Exception) -> None:
        now = time.time()
        if now - datetime.fromisoformat(body["at"]).timestamp() > GIVE_UP_S:
            log.error("alert %s is given up: %s (%s: %s)", alert_id, body["text"], sink, error)
            self._state.delivered(alert_id, sink)
            return
        if sink not in self._said:
            self._said.add(sink)
            log.warning(
                "alert %s (%s) can't be delivered by %s, and is tried again: %s", alert_id, body["text"], sink, error
            )
        self._state.postpone(alert_id, sink, now + min(_LONGEST_PAUSE_S, 2.0 ** min(tries, 12)))

    def _post(self, body: dict[str, Any]) -> None:
        if self._webhook is None:
            raise LookupError("no webhook is set any more")
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": body["id"], "User-Agent": "pyworkflow-ray"}
        request = urllib.request.Request(self._webhook, data, headers, method="POST")
        try:
            with _opener.open(request, timeout=ANSWER_S):
                return
        except urllib.error.HTTPError as error:
            with error:
                raise ConnectionError(f"{urlsplit(self._webhook).netloc} answered {error.code}") from None

    def _call(self, body: dict[str, Any]) -> None:
        run_id = body.get("run_id") or self._state.recall("callback_run")
        given = {**self._calling, "run_id": run_id, "alert": body}
        code = "from pyworkflow_ray.runtime.alerts import call_main; call_main()"
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if done.returncode != 0:
            raise RuntimeError(f"the callback's process ended with {done.returncode}: {done.stderr.strip()[-500:]}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A webhook that moved must be set anew: a redirect would make a GET of it, which is no delivery."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def call_main() -> None:
    """Of a callback's process: what it is to call comes as JSON on stdin."""
    from pyworkflow_ray.engine.events import RunCreated
    from pyworkflow_ray.execution.alerts import call_back
    from pyworkflow_ray.execution.environment import enter_environment
    from pyworkflow_ray.storage.codec import StorageCodec
    from pyworkflow_ray.storage.codec_mark import load_hook
    from pyworkflow_ray.storage.storage import Storage

    given = json.load(sys.stdin)
    storage = Storage.open(Path(given["storage"]), create=False)
    created = storage.read_run(given["run_id"]).events[0]
    assert isinstance(created, RunCreated)
    enter_environment(created.environment)
    hook = load_hook(given.get("codec"))
    codec = StorageCodec(storage, hook=hook, allow_pickle=given.get("allow_pickle", True))
    call_back(created, given["alert"], codec)
