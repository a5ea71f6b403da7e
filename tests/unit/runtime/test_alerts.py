"""Alerts come at least once: by a webhook that refuses, to a callback that raises, over a kill -9 of the sender."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.execution import hooks
from pyworkflow_ray.execution.alerts import on_alert
from pyworkflow_ray.runtime import alerts as delivering
from pyworkflow_ray.runtime.observer_state import State
from pyworkflow_ray.runtime.observing import Observer
from pyworkflow_ray.storage.breaker_states import BreakerStates
from pyworkflow_ray.storage.storage import Storage
from tests.unit.runtime.test_observing import ROOT, Run, until

ERROR = ev.ErrorInfo(kind="permanent", type="CardDeclined", message="no funds")


class Hook:
    """A webhook's receiver. It answers `code`, and while `holding` not at all until it is let go."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.code = 204
        self.go_on = threading.Event()
        self.go_on.set()
        self.url = ""


@pytest.fixture
def hook() -> Iterator[Hook]:
    one = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            one.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            one.keys.append(self.headers["Idempotency-Key"])
            one.go_on.wait(30)
            self.send_response(one.code)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.url = f"http://127.0.0.1:{server.server_address[1]}/secret"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield one
    one.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "runs")


def failed_run(storage: Storage, **fields: Any) -> Run:
    run = Run(storage, "order-7", **fields)
    run.add(ev.RunFailed(error=ERROR))
    run.journal.finish()
    return run


def observe(storage: Storage, webhook: str | None) -> Observer:
    state = State(storage.root)
    observer = Observer(storage, state, None, webhook=webhook)
    observer.begin()
    return observer


def test_webhook_that_refuses_gets_it_again_with_the_same_id(storage: Storage, hook: Hook, monkeypatch: Any) -> None:
    hook.code = 503
    monkeypatch.setattr(delivering, "_LONGEST_PAUSE_S", 0.01)
    Run(storage, "other")
    observer = observe(storage, hook.url)
    failed_run(storage)
    observer.look({"order-7"}, at_once=True)
    until(lambda: len(hook.got) >= 2, "it is tried again")
    hook.code = 200
    until(lambda: not observer._state.waiting_alerts(), "it is delivered")
    assert {one["id"] for one in hook.got} == set(hook.keys) == {hook.got[0]["id"]}
    assert hook.got[0]["text"] == "run order-7 (checkout) failed: CardDeclined: no funds"


def test_alert_is_enqueued_once_whoever_reads_the_log(storage: Storage, hook: Hook) -> None:
    observe(storage, None)
    failed_run(storage)
    for _ in range(2):
        observer = observe(storage, hook.url)
        observer.all_unfinished()
        until(lambda: not State(storage.root).waiting_alerts(), "it is delivered")
    assert len(hook.got) == 1


def start_process(storage: Storage, webhook: str) -> subprocess.Popen[str]:
    code = "from pyworkflow_ray.runtime.observing import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None
    process.stdin.write(json.dumps({"storage": storage.root, "telemetry": {}, "webhook": webhook}) + "\n")
    process.stdin.flush()
    return process


def test_kill_of_the_sender_loses_no_alert(storage: Storage, hook: Hook) -> None:
    """It is killed while the webhook has the alert and has not answered."""
    hook.go_on.clear()
    Run(storage, "living")
    first = start_process(storage, hook.url)
    until(lambda: State(storage.root).recall("begun"), "it follows")
    failed_run(storage)
    assert first.stdin is not None
    first.stdin.write('{"runs": ["order-7"]}\n')
    first.stdin.flush()
    until(lambda: hook.got, "the webhook has it")
    first.send_signal(signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL
    assert State(storage.root).waiting_alerts() == 1
    hook.go_on.set()
    second = start_process(storage, hook.url)
    until(lambda: not State(storage.root).waiting_alerts(), "another has delivered it")
    assert second.stdin is not None
    second.stdin.close()
    assert second.wait(30) == 0
    assert len({one["id"] for one in hook.got}) == 1
    assert len(hook.got) == 2


def test_breaker_that_opens_is_an_alert_once(storage: Storage, hook: Hook) -> None:
    observer = observe(storage, hook.url)
    kept = BreakerStates(storage.root, "payments")
    kept.save([("host-7", {"generation": 1, "state": "open", "reason": "5 failures in a row"})], 1_800_000_000.0)
    for one in (observer, observer, observe(storage, hook.url)):
        one.look_at_breakers()
    until(lambda: hook.got, "it is delivered")
    kept.save([("host-7", {"generation": 2, "state": "half_open", "reason": ""})], 1_800_000_060.0)
    observer.look_at_breakers()
    kept.save([("host-7", {"generation": 3, "state": "open", "reason": "the probe failed"})], 1_800_000_061.0)
    observer.look_at_breakers()
    until(lambda: len(hook.got) == 2, "the second opening is delivered")
    assert [one["text"] for one in hook.got] == [
        "circuit breaker payments[host-7] opened: 5 failures in a row",
        "circuit breaker payments[host-7] opened: the probe failed",
    ]


def test_callback_is_called_again_until_it_returns(storage: Storage, tmp_path: Path, monkeypatch: Any) -> None:
    """It kills its process the first time, raises the second, and returns the third."""
    (tmp_path / "shop_alerts.py").write_text(
        "import os, pathlib\n"
        "def tell(alert):\n"
        "    path = pathlib.Path(__file__).with_suffix('.told')\n"
        "    seen = path.read_text().splitlines() if path.exists() else []\n"
        "    path.write_text('\\n'.join([*seen, f'{alert.id} {alert.what} {alert.run_id}']) + '\\n')\n"
        "    if not seen: os.kill(os.getpid(), 9)\n"
        "    if len(seen) == 1: raise OSError('mail')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(delivering, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(hooks, "_own", {name: [] for name in hooks._own})
    import shop_alerts

    on_alert(shop_alerts.tell)
    Run(storage, "other")
    observer = observe(storage, None)
    environment = ev.CodeEnvironment(key="k", python=hooks.python_version(), import_roots=(str(tmp_path),))
    failed_run(storage, hooks=hooks.describe_hooks(), environment=environment)
    observer.look({"order-7"}, at_once=True)
    told = tmp_path / "shop_alerts.told"
    until(lambda: told.exists() and not observer._state.waiting_alerts(), "it has returned")
    lines = told.read_text().splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert lines[0].endswith("run_failed order-7")
