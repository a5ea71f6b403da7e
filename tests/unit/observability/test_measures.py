"""Metrics: measured once from a run's events, and shown at a Prometheus endpoint that a dashboard asks."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.observability.measures import INSTRUMENTS, Measure, MeasureFold
from pyworkflow_ray.observability.meters import Meters, make_readers

Make = Callable[..., Any]
DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana" / "pyworkflow-ray.json"


def folded(events: list[ev.Event]) -> list[Measure]:
    assert isinstance(events[0], ev.RunCreated)
    fold = MeasureFold(events[0])
    for event in events[1:]:
        fold.apply(event)
    return fold.take()


def total(measures: list[Measure], name: str, **attributes: Any) -> float:
    wanted = {key if "." in key else f"pyworkflow.{key}": value for key, value in attributes.items()}
    return sum(m.value for m in measures if m.name == name and wanted.items() <= m.attributes.items())


@pytest.fixture
def stormy(history: Make, make_error: Make) -> list[ev.Event]:
    """Everything there is to measure."""
    run = history(attributes={"customer": "acme"}).activated(0).scheduled(1, "charge", breaker="pay", max_retries=3)
    run.failed_attempt(3, "1", 1, 0.5, took=1).started(4, "1", 2)
    run.activated(10, 1, "recovery").add(10, ev.StepLost(position="1", dispatch=0, attempt=2, cause="run_actor_lost"))
    run.add(11, ev.StepDispatched(position="1", dispatch=1)).completed_step(12, "1", 3, took=1)
    refused = make_error("CircuitOpenError", "open", "cascade")
    run.scheduled(12, "notify", breaker="pay")
    run.add(13, ev.StepFailed(position="2", dispatch=1, attempt=0, error=refused, why="refused"))
    code = ev.CodeRef(how="import", name="each")
    run.add(13, ev.MapScheduled(position="3", number=3, step="each", code=code, chunk_size=2, concurrency=1, total=2))
    chunk = ev.ChunkCompleted(
        position="3", first=0, count=2, done=2, dispatch=1, started_at=0, ended_at=0, last=True,
        failures=[ev.ItemFailure(index=1, error=0, attempt=1)], errors=[make_error()], retried={"OSError": 2},
    )  # fmt: skip
    run.add(14, chunk).add(20, ev.RunFailed(error=refused, position="2"))
    return list(run.events)


def test_each_thing_is_measured_once(stormy: list[ev.Event]) -> None:
    got = folded(stormy)
    assert total(got, "pyworkflow.run.started", workflow="checkout") == 1
    assert total(got, "pyworkflow.run.ended", outcome="failed", kind="cascade") == 1
    assert total(got, "pyworkflow.run.duration") == 20
    assert total(got, "pyworkflow.run.recoveries", cause="run_actor_lost") == 1
    assert total(got, "pyworkflow.run.recovery.duration") == 6  # from 4 to 10
    assert total(got, "pyworkflow.step.attempts", step="charge", outcome="failed", kind="transient") == 1
    assert total(got, "pyworkflow.step.attempts", step="charge", outcome="lost") == 1
    assert total(got, "pyworkflow.step.attempts", step="charge", outcome="succeeded") == 1
    assert total(got, "pyworkflow.step.attempts", step="each", outcome="failed") == 2
    assert total(got, "pyworkflow.step.retry.wait", reason="backoff") == 0.5
    assert total(got, "pyworkflow.step.queue.duration", step="charge") == 1
    assert total(got, "pyworkflow.breaker.refusals", breaker="pay") == 1
    assert total(got, "pyworkflow.step.ended", outcome="failed", why="refused") == 1
    assert total(got, "pyworkflow.step.items", step="each", outcome="failed") == 1
    assert {m.name for m in got} <= set(INSTRUMENTS)


def test_attributes_have_few_values(stormy: list[ev.Event]) -> None:
    shown = json.dumps([m.attributes for m in folded(stormy)])
    assert "order-42" not in shown
    assert "acme" not in shown
    assert "503 from payments" not in shown


def test_what_a_successor_counts_is_what_is_left(stormy: list[ev.Event]) -> None:
    whole = folded(stormy)
    assert isinstance(stormy[0], ev.RunCreated)
    for cut in range(1, len(stormy)):
        fold = MeasureFold(stormy[0])
        for event in stormy[1:cut]:
            fold.apply(event)
        before = fold.take()
        for event in stormy[cut:]:
            fold.apply(event)
        assert [*before, *fold.take()] == whole


# The endpoint -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def show_everything(meters: Meters, stormy: list[ev.Event]) -> None:
    """Every instrument has a value."""
    meters.add(folded(stormy))
    meters.add([Measure("pyworkflow.journal.commit.duration", 0.0004, {})])
    changed = {"pyworkflow.breaker": "pay", "pyworkflow.from": "closed", "pyworkflow.to": "open"}
    meters.add([Measure("pyworkflow.breaker.transitions", 1, changed)])
    for state in ("closed", "open"):
        about = {"pyworkflow.breaker": "pay", "pyworkflow.key": "host-7", "pyworkflow.state": state}
        meters.show("pyworkflow.breaker.state", [(float(state == "open"), about)])
    meters.show("pyworkflow.breaker.failures", [(5, {"pyworkflow.breaker": "pay"})])
    meters.show("pyworkflow.budget.tokens", [(400, {"pyworkflow.budget": "all"})])
    meters.show("pyworkflow.budget.limit", [(500, {"pyworkflow.budget": "all"})])
    meters.show("pyworkflow.run.unfinished", [(3, {"pyworkflow.workflow": "checkout", "pyworkflow.status": "parked"})])
    meters.show("pyworkflow.alert.waiting", [(0, {})])


@pytest.fixture
def endpoint(stormy: list[ev.Event]) -> str:
    port = free_port()
    environ = {"OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1", "OTEL_EXPORTER_PROMETHEUS_PORT": str(port)}
    readers = make_readers(["prometheus"], environ)
    assert len(readers) == 1
    show_everything(Meters(readers), stormy)
    return f"127.0.0.1:{port}"


def names_at(endpoint: str) -> set[str]:
    return {line.split()[2] for line in get(f"http://{endpoint}/metrics").splitlines() if line.startswith("# TYPE")}


def queries() -> list[str]:
    """Of all panels and variables, as Grafana asks them."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    found += [
        re.sub(r"label_values\((\w+),.*\)", r"\1", one["query"]["query"]) for one in board["templating"]["list"][1:]
    ]
    return [q.replace("$__rate_interval", "1m").replace("$workflow", ".*") for q in found]


def test_every_instrument_is_at_the_endpoint_and_every_one_is_on_the_dashboard(endpoint: str) -> None:
    shown = {name for name in names_at(endpoint) if name.startswith("pyworkflow_")}
    families = {name.removesuffix("_total").removesuffix("_seconds") for name in shown}
    assert families == {name.replace(".", "_") for name in INSTRUMENTS}
    asked = set(re.findall(r"\bpyworkflow_\w+?(?=_bucket|_sum|_count|[^\w]|$)", " ".join(queries())))
    labels = set(re.findall(r"(pyworkflow_\w+)=", get(f"http://{endpoint}/metrics")))
    assert asked - labels - shown == set(), "the dashboard asks for what there is not"
    assert families == {name.removesuffix("_total").removesuffix("_seconds") for name in asked - labels}


def test_taken_port_and_wrong_port_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = {"OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1", "OTEL_EXPORTER_PROMETHEUS_PORT": port}
        assert make_readers(["prometheus"], environ) == []
    assert "set OTEL_EXPORTER_PROMETHEUS_PORT to a free one" in caplog.text
    assert make_readers(["prometheus"], {"OTEL_EXPORTER_PROMETHEUS_PORT": "http"}) == []
    assert "OTEL_EXPORTER_PROMETHEUS_PORT='http' is no port" in caplog.text


@pytest.mark.slow
def test_promtool_and_prometheus_accept_it(endpoint: str, tmp_path: Path) -> None:
    """`apt-get install prometheus` has both."""
    promtool, prometheus = shutil.which("promtool"), shutil.which("prometheus")
    assert promtool, "no promtool here: apt-get install prometheus"
    assert prometheus, "no prometheus here: apt-get install prometheus"
    scrape = get(f"http://{endpoint}/metrics")
    checked = subprocess.run([promtool, "check", "metrics"], input=scrape, capture_output=True, text=True, check=False)
    ours = [line for line in (checked.stdout + checked.stderr).splitlines() if line.startswith("pyworkflow_")]
    assert ours == []
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: pyworkflow, static_configs: [{{targets: ['{endpoint}']}}]}}]\n"
    )
    port = free_port()
    command = [prometheus, f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}/api/v1"
        deadline = time.monotonic() + 60
        while len(asked(base, "pyworkflow_run_started_total[30s]")[0:1]) < 1 or samples(base) < 3:
            assert time.monotonic() < deadline, "it has not been scraped"
            threading.Event().wait(0.1)
        empty = [query for query in queries() if not asked(base, query)]
        assert empty == [], "queries of the dashboard that find nothing"
    finally:
        server.terminate()
        server.wait(10)


def samples(base: str) -> int:
    found = asked(base, "pyworkflow_run_started_total[30s]")
    return len(found[0]["values"]) if found else 0


def asked(base: str, query: str) -> list[Any]:
    try:
        answer = json.loads(get(f"{base}/query?{urllib.parse.urlencode({'query': query})}"))
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []  # it is starting
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    except OSError:
        return []  # it is starting
    assert answer["status"] == "success", answer
    return list(answer["data"]["result"])
