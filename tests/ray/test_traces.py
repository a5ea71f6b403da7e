"""Traces over the wire, with real SIGKILLs: no span is lost, none comes twice, none is an orphan."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import trace_flows
from processes import descendants, kill, until

from pyworkflow_ray.engine.events import RunActivated, RunParked
from pyworkflow_ray.observability.trace import trace_spans
from pyworkflow_ray.runtime.messages import NAMESPACE, controller_name
from pyworkflow_ray.runtime.observer_state import State
from pyworkflow_ray.storage.storage import Storage
from tests.otlp import Receiver, otlp_receiver

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
RUNS = 2


def start_runs(storage: Path, folder: Path, receiver: Receiver, count: int, port: int) -> tuple[str, str]:
    """Trace and span id of the caller."""
    import ray

    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    env.update(
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_HEADERS="x-team=shop",
        OTEL_SERVICE_NAME="shop",
        PYWORKFLOW_LOG_FORMAT="json",
        PYWORKFLOW_ALERT_WEBHOOK=f"{receiver.endpoint}/alert",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        OTEL_METRICS_EXPORTER="prometheus",
        OTEL_EXPORTER_PROMETHEUS_HOST="127.0.0.1",
        OTEL_EXPORTER_PROMETHEUS_PORT=str(port),
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(HERE / "trace_script.py"), str(storage), address, str(folder), str(count)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    trace_id, span_id = done.stdout.split()[-2:]
    return trace_id, span_id


def observers(storage: Path) -> list[int]:
    state = str(storage)
    return [pid for pid in descendants("observing import main") if state in open_files(pid)]


def controller_of(storage: Storage) -> int:
    """Its pid. This process is connected to another storage's."""
    import ray

    controller = ray.get_actor(controller_name(storage.storage_id), namespace=NAMESPACE)
    return int(ray.get(controller.ready.remote())["pid"])


def open_files(pid: int) -> str:
    found = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except OSError:
            continue
    return "\n".join(found)


def test_no_span_is_lost_none_comes_twice_and_none_is_an_orphan(ray_cluster: None, tmp_path: Path) -> None:
    root, folder = tmp_path / "runs", tmp_path / "work"
    folder.mkdir()
    port = free_port()
    with otlp_receiver() as receiver:
        trace_id, caller = start_runs(root, folder, receiver, RUNS, port)
        storage = Storage.open(root, create=False)
        for number in range(RUNS):  # one at the gate after the other: kill its owner there, and a worker with it
            run_id, own = f"traced-{number}", str(folder / str(number))
            until(lambda own=own: trace_flows.lines(own, trace_flows.GATED), "the run is at its gate")
            events = storage.read_run(run_id).events
            owner = next(int(e.worker) for e in reversed(events) if isinstance(e, RunActivated))
            worker = int(trace_flows.lines(own, trace_flows.GATED)[0].split()[0])
            kill(worker if number % 2 else owner)
            until(lambda own=own: len(trace_flows.lines(own, trace_flows.GATED)) > 1, "another executes the step")
        runs = [*(f"traced-{number}" for number in range(RUNS)), "declined-0"]
        state = State(storage.root)
        until(lambda: all(is_sent(state, storage, run_id) for run_id in runs), "what there is was sent")
        (observer,) = observers(root)  # between two batches: within one it would be sent again, with the same ids
        kill(observer)
        kill(controller_of(storage))
        for number in range(RUNS):
            (folder / str(number) / "gate").touch()
        until(lambda: all(storage.read_run(run_id).finished for run_id in runs), "the runs have ended")
        until(lambda: set(runs) <= state.done() and not state.places_of_done(), "all is told")
        until(
            lambda: user_spans(receiver, trace_id) >= RUNS * trace_flows.STEPS * 2 + 2 * RUNS, "users' spans are there"
        )
        spans = receiver.of_trace(trace_id)
        ids = {span.span_id: span for span in spans}
        assert len(spans) == len(ids), "a span came twice"
        told = {s.span_id for run_id in runs for s in trace_spans(storage.read_run(run_id).events)}
        assert told <= set(ids), "a span was lost"
        assert [s.name for s in spans if s.parent_id not in ids and s.parent_id != caller] == []
        assert sum(span.parent_id == caller for span in spans) == len(runs)
        check_what_was_told(receiver, storage, folder, ids, runs[:RUNS])
        check_logs(runs[:RUNS], trace_id, ids)
        until(lambda: receiver.alerts, "the webhook is told")
        assert [(one["what"], one["run_id"]) for one in receiver.alerts] == [("run_failed", "declined-0")]
        until(lambda: 'pyworkflow_breaker="traced-pay"' in scrape(port), "the breaker is seen")
        until(lambda: "pyworkflow_journal_commit_duration_seconds_count" in scrape(port), "commits are measured")


def log_lines() -> list[dict]:
    """What workers of this session have logged as JSON."""
    import ray

    logs = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    text = "".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
    return sorted(found, key=lambda line: line["time"])


def check_logs(runs: list[str], trace_id: str, ids: dict) -> None:
    found = log_lines()
    for run_id in runs:
        mine = [line for line in found if line.get("run") == run_id]
        body = [line["message"] for line in mine if line["message"].startswith("body")]
        assert body == ["body begins", *(f"body is past {n}" for n in range(trace_flows.STEPS))], "a line came twice"
        assert {line["trace_id"] for line in mine} == {trace_id}
        begins = [line for line in mine if line["message"] == "step 4 begins"]
        assert [(line["step"].rpartition(":")[2], line["attempt"], line["logger"]) for line in begins] == [
            ("work", 1, "shop")
        ]
        assert begins[0]["span_id"] in ids
        failed = [line for line in mine if "ConnectionError: once" in line["message"]]
        assert [(line["level"], line["attempt"]) for line in failed] == [("INFO", 1)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def is_sent(state: State, storage: Storage, run_id: str) -> bool:
    return state.cursor(run_id)[1] == len(storage.read_run(run_id).events)


def user_spans(receiver: Receiver, trace_id: str) -> int:
    return sum(span.name.startswith(("outer", "inner")) for span in receiver.of_trace(trace_id))


def check_what_was_told(receiver: Receiver, storage: Storage, folder: Path, ids: dict, runs: list[str]) -> None:
    names = [span.name for span in ids.values()]
    assert names.count("parked") == RUNS
    assert names.count("retry wait") == RUNS
    assert names.count("recovery") >= 1
    for number, run_id in enumerate(runs):
        events = storage.read_run(run_id).events
        assert any(isinstance(event, RunParked) for event in events)
        for step in range(trace_flows.STEPS):  # of every execution that came to its end the step saw its own span
            _, inner = trace_flows.lines(str(folder / str(number)), step)[-1].split()
            outer = ids[ids[inner].parent_id]
            attempt = ids[outer.parent_id]
            assert (outer.name, attempt.name) == (f"outer {step}", attempt.name)
            assert attempt.attributes["pyworkflow.status"] == "succeeded"
            assert outer.attributes["pyworkflow.run_id"] == run_id
            assert attempt.start <= outer.start <= outer.end <= attempt.end + 10**6
            assert (outer.resource["service.name"], attempt.resource["service.name"]) == ("shop", "shop")
    assert all(headers.get("x-team") == "shop" for headers in receiver.headers)
