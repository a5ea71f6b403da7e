"""The observer over a real storage and a real receiver: what is told, once, whatever is killed or away. No Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.current import Spool
from pyworkflow_ray.observability.spandata import SpanData, attempt_span_id, run_span_id
from pyworkflow_ray.observability.trace import trace_spans
from pyworkflow_ray.runtime import span_sender
from pyworkflow_ray.runtime.observer_state import FILE, State
from pyworkflow_ray.runtime.observing import Observer
from pyworkflow_ray.runtime.span_sender import Sender
from pyworkflow_ray.storage.storage import Storage
from tests.otlp import Receiver, otlp_receiver

ROOT = Path(__file__).resolve().parents[3]
START = 1_800_000_000.0


def until(look: Callable[[], Any], what: str, patience_s: float = 30.0) -> Any:
    deadline = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        threading.Event().wait(0.005)
    return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with otlp_receiver() as one:
        yield one


@pytest.fixture
def asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    monkeypatch.setattr(span_sender, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(span_sender, "_LONGEST_PAUSE_S", 0.02)


class Run:
    """A run whose owner is this process."""

    def __init__(self, storage: Storage, run_id: str, **fields: Any) -> None:
        self.storage, self.run_id, self.seq = storage, run_id, 0
        created = ev.RunCreated(
            seq=0, at=START, run_id=run_id, run_uid=f"u-{run_id}", storage_id=storage.storage_id,
            workflow="shop:checkout", code=ev.CodeRef(how="import", name="checkout"),
            **{"environment": ev.CodeEnvironment(key="k", python="3.11"), **fields},
        )  # fmt: skip
        storage.create_run(created, lease="l1")
        self.journal, _ = storage.activate(run_id, "l1", first=True)
        self.add(ev.RunActivated(epoch=0))

    def add(self, *events: ev.Event) -> None:
        numbered = []
        for event in events:
            self.seq += 1
            numbered.append(event.model_copy(update={"seq": self.seq, "at": START + self.seq}))
        self.journal.append(numbered).result()

    def step(self, position: str, end: bool = True) -> None:
        code = ev.CodeRef(how="import", name="charge")
        self.add(ev.StepScheduled(position=position, number=int(position), step="shop:charge", code=code))
        if end:
            result = ev.Payload(enc="json", data=1)
            done = ev.StepCompleted(
                position=position, dispatch=1, attempt=1, started_at=START, ended_at=START + 1, result=result
            )
            self.add(done)

    def end(self) -> None:
        self.add(ev.RunCompleted(result=ev.Payload(enc="json", data=1)))
        self.journal.finish()

    def spans(self) -> set[str]:
        return {span.span_id for span in trace_spans(self.storage.read_run(self.run_id).events)}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "runs")


def observer(storage: Storage) -> tuple[Observer, Sender]:
    state = State(storage.root)
    sender = Sender(state, ("otlp",))
    made = Observer(storage, state, sender)
    made.begin()
    return made, sender


def ids(receiver: Receiver) -> list[str]:
    with receiver.lock:
        return sorted(span.span_id for span in receiver.spans)


@pytest.mark.usefixtures("asked")
def test_each_span_is_sent_once_as_the_run_goes_on(storage: Storage, receiver: Receiver) -> None:
    run = Run(storage, "a")
    one, sender = observer(storage)
    run.step("1")
    one.look({"a"}, at_once=True)
    assert sender.flush(10)
    assert len(ids(receiver)) == 3  # queued, attempt, step
    run.step("2")
    run.end()
    other, sender = observer(storage)  # as after a kill: it goes on where the first one stood
    assert sender.flush(10)
    other.look({"a"}, at_once=True)
    assert sender.flush(10)
    assert ids(receiver) == sorted(run.spans())
    assert State(storage.root).done() == {"a"}


@pytest.mark.usefixtures("asked")
def test_runs_that_had_ended_before_are_none_of_ours(storage: Storage, receiver: Receiver) -> None:
    old = Run(storage, "old")
    old.end()
    living = Run(storage, "living")
    living.step("1")
    one, sender = observer(storage)
    living.end()
    one.look({"living"}, at_once=True)
    assert sender.flush(10)
    assert ids(receiver) == sorted(living.spans())


@pytest.mark.usefixtures("asked")
def test_spans_wait_while_the_collector_refuses(storage: Storage, receiver: Receiver) -> None:
    receiver.refusing = True
    run = Run(storage, "a")
    run.step("1")
    run.end()
    one, sender = observer(storage)
    one.look({"a"}, at_once=True)
    until(lambda: receiver.refused >= 2, "it was refused and tried again")
    assert State(storage.root).cursor("a")[1] == 0
    receiver.refusing = False
    assert sender.flush(30)
    assert ids(receiver) == sorted(run.spans())


@pytest.mark.usefixtures("asked")
def test_run_that_is_not_sampled_sends_nothing(storage: Storage, receiver: Receiver) -> None:
    run = Run(storage, "a", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-00", trace_id="a" * 32)
    run.end()
    one, sender = observer(storage)
    one.look({"a"}, at_once=True)
    assert sender.flush(10)
    assert ids(receiver) == []
    assert State(storage.root).done() == {"a"}


@pytest.mark.usefixtures("asked")
def test_users_spans_are_sent_once_and_none_is_an_orphan(storage: Storage, receiver: Receiver) -> None:
    run = Run(storage, "a")
    run.step("1")
    run.step("2", end=False)  # cancelled by the run's end, before its worker told that attempt 1 had begun
    spool = Spool(storage.root)
    for position in ("1", "2"):
        above = attempt_span_id("u-a", position, 0, 1, 1)
        span = SpanData("mine", "a" * 32, f"{int(position):016x}", above, 1, 2, remote_parent=True)
        spool.write({"place": ["a", position, 0, 1, 1], "spans": [json.loads(span.to_json())]})
    one, sender = observer(storage)
    one.all_unfinished()
    run.end()
    one.look({"a"}, at_once=True)
    assert sender.flush(10)
    one.all_unfinished()
    assert sender.flush(10)
    got = {span.span_id: span for span in receiver.spans}
    assert len(got) == len(receiver.spans)
    assert [span.name for span in got.values() if span.parent_id and span.parent_id not in got] == []
    assert got[attempt_span_id("u-a", "2", 0, 1, 1)].attributes["pyworkflow.status"] == "unknown"
    assert not one._state.places_of_done()


def start_process(storage: Storage, endpoint: str) -> subprocess.Popen[str]:
    code = "from pyworkflow_ray.runtime.observing import main; main()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    env["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=env)
    about = {"storage": storage.root, "telemetry": {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}}
    assert process.stdin is not None
    process.stdin.write(json.dumps(about) + "\n")
    process.stdin.flush()
    return process


def counted(receiver: Receiver, name: str) -> float:
    """The counter as the last export has it."""
    scopes = [scope for resource in receiver.metrics[-1].resource_metrics for scope in resource.scope_metrics]
    points = [p for scope in scopes for m in scope.metrics if m.name == name for p in m.sum.data_points]
    return float(sum(point.as_int or point.as_double for point in points))


def test_killed_observer_goes_on_where_it_stood_and_the_last_tells_all(storage: Storage, receiver: Receiver) -> None:
    run = Run(storage, "a")
    run.step("1")
    first = start_process(storage, receiver.endpoint)
    until(lambda: State(storage.root).cursor("a")[1] == 4, "the first step is told")
    second = start_process(storage, receiver.endpoint)  # waits for the lock
    first.send_signal(signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL
    run.step("2")
    run.end()
    assert second.stdin is not None
    second.stdin.write('{"runs": ["a"]}\n')
    second.stdin.close()  # as when the controller has died
    assert second.wait(30) == 0
    assert ids(receiver) == sorted(run.spans())
    assert counted(receiver, "pyworkflow.run.ended") == 1
    assert counted(receiver, "pyworkflow.step.ended") == 1  # the first was the first observer's
    root = next(span for span in receiver.spans if span.span_id == run_span_id("u-a"))
    assert root.resource["service.name"] == "pyworkflow-ray"


def test_damaged_state_is_put_aside_and_begun_anew(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    state = State(storage.root)
    state.saw([("a", 3)])
    state.close()
    path = Path(storage.root) / FILE
    path.write_bytes(b"x" * 8192)
    assert State(storage.root).cursor("a") == (0, 0)
    assert "put aside" in caplog.text
