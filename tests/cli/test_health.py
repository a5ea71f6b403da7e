"""`health`: what it prints, its exit codes, and health over HTTP. No Ray; a port where nobody answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.cli.health_server import HUNG_S, Reports, answer
from pyworkflow_ray.observability.health import HealthReport

Invoke = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
DEAD = "127.0.0.1:1"


def test_a_storage_in_order_is_ok(invoke: Invoke, empty: Any) -> None:
    result = invoke("health", "--storage", empty.root, "--address", "local")
    assert result.exit_code == 0
    verdict, head, *rows = result.stdout.splitlines()
    assert verdict.startswith("✓ ok: 8 checks, in ")
    assert head.split() == ["CHECK", "STATE", "WHY", "REMEDY"]
    assert [row.split()[0] for row in rows] == "ray controller anchors pool storage runs timers breakers".split()


def test_a_dead_address_is_failing_and_exits_with_1(invoke: Invoke, empty: Any) -> None:
    result = invoke("health", "--storage", empty.root, "--address", DEAD, "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert (shown["schema"], shown["status"]) == (1, "failing")
    checks = {check["name"]: check for check in shown["checks"]}
    assert checks["ray"]["status"] == "failing"
    assert DEAD in checks["ray"]["why"]
    assert checks["ray"]["remedy"]
    assert checks["controller"]["status"] == "skipped"
    assert checks["storage"]["status"] == "ok"  # it is told of, all the same


def test_runs_that_nobody_looks_after_are_degraded_and_strict_makes_that_1(invoke: Invoke, shop: Any) -> None:
    shop.lease.close()
    arguments = ("health", "--storage", shop.root, "--address", "local")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["status"] == "degraded"
    (runs,) = [check for check in shown["checks"] if check["name"] == "runs"]
    assert "1 stuck (order-42: no living process holds the run" in runs["why"]
    assert "1 that nobody holds (order-40)" in runs["why"]
    assert runs["remedy"] == "pyworkflow-ray recover"
    assert invoke(*arguments, "--strict").exit_code == 1


def test_a_damaged_run_is_told_of(invoke: Invoke, shop: Any) -> None:
    shop.journal_of("order-40").write_bytes(b"nonsense\n" * 100)
    result = invoke("health", "--storage", shop.root, "--address", "local")
    assert "1 can't be read (order-40)" in result.stdout
    assert "storage verify" in result.stdout


def test_a_wrong_setting_is_usage(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_POOL_MIN", "many")
    result = invoke("health", "--storage", tmp_path / "s")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "PYWORKFLOW_POOL_MIN='many'" in result.stderr


# Over HTTP --------------------------------------------------------------------------------------------------------


def report(status: str) -> HealthReport:
    check = {"name": "ray", "status": status, "why": "w"}
    return HealthReport.model_validate({"at": "2026-01-01T00:00:00Z", "storage": "/s", "checks": [check]})


@pytest.mark.parametrize(
    ("status", "code", "body"),
    [("ok", 200, "ok\n"), ("degraded", 200, "degraded: ray degraded\n"), ("failing", 503, "failing: ray failing\n")],
)
def test_readiness_is_503_only_where_something_is_failing(status: str, code: int, body: str) -> None:
    reports = Reports(lambda: report(status))
    assert answer(reports, "/readyz?verbose=1") == (code, "text/plain", body)
    got, kind, text = answer(reports, "/health/")
    assert (got, kind, json.loads(text)["status"]) == (code, "application/json", status)
    assert answer(reports, "/livez") == (200, "text/plain", "ok\n")
    assert answer(reports, "/nosuch")[0] == 404


def test_one_report_serves_whoever_asks_within_a_second() -> None:
    now, made = [100.0], []
    reports = Reports(lambda: made.append(now[0]) or report("ok"), clock=lambda: now[0])  # type: ignore[func-returns-value]
    for now[0] in (100.0, 100.9, 101.1, 101.2, 102.2):
        assert answer(reports, "/readyz")[0] == 200
    assert made == [100.0, 101.1, 102.2]


def test_a_process_whose_report_never_ends_is_not_alive() -> None:
    now = [0.0]

    def look() -> HealthReport:
        now[0] += HUNG_S + 1
        told.append(answer(reports, "/livez"))
        return report("ok")

    told: list[Any] = []
    reports = Reports(look, clock=lambda: now[0])
    reports.report()
    assert told[0][0] == 503
    assert answer(reports, "/livez")[0] == 200


@pytest.fixture
def served(empty: Any) -> Iterator[int]:
    """The port of a server of its own process, which is told of a dead cluster."""
    server = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow_ray", "health", "--serve", "0", "--address", DEAD, "--storage", empty.root],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        assert line.startswith("health on http://127.0.0.1:"), line
        yield int(line.partition("127.0.0.1:")[2].partition("/")[0])
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    finally:
        server.kill()
        server.communicate()


def test_the_server_answers_over_the_wire(served: int) -> None:
    for path, status, body in (
        ("/livez", 200, b"ok\n"),
        ("/readyz", 503, b"failing: ray failing\n"),
        ("/nosuch", 404, b"not here: /livez, /readyz, /health\n"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", served, timeout=60)
        connection.request("GET", path)
        got = connection.getresponse()
        assert (got.status, got.read()) == (status, body)
        connection.request("HEAD", path)
        got = connection.getresponse()
        assert (got.status, got.read(), int(got.headers["Content-Length"])) == (status, b"", len(body))
        connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=60)
    connection.request("GET", "/health")
    shown = json.loads(connection.getresponse().read())
    assert shown["status"] == "failing"
    connection.request("POST", "/health")
    assert connection.getresponse().status == 501
    connection.close()
