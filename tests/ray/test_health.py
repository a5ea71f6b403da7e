"""`pw.health()` tells what is broken, and why: each thing is really broken, by a signal, and mended again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import flows
import pytest
import ray
from processes import controller_pid, descendants, kill, until

import pyworkflow_ray as pw
from pyworkflow_ray.resilience.breaker import BreakerEvent, BreakerState
from pyworkflow_ray.resilience.breaker_settings import full_name
from pyworkflow_ray.runtime import breaker_admin

pytestmark = pytest.mark.ray

LIMIT_S = 3.0


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs: it lives, and answers nobody."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def one(title: str) -> int:
    found = descendants(title)
    assert found, f"no process {title!r}"
    return found[0]


@pytest.fixture(scope="module", autouse=True)
def no_breaker_of_others_is_open(runtime: Path) -> None:
    """Other tests of this cluster leave theirs open, which health tells."""
    for row in breaker_admin.rows()[0]:
        if row.view.state is not BreakerState.CLOSED:
            breaker_admin.force(full_name(row.name, row.key), BreakerEvent.RESET)


@pytest.fixture(autouse=True)
def in_order(runtime: Path) -> Iterator[None]:
    """Everything is in order before, and is again after what a test broke."""
    assert pw.run(flows.three, 1) == 3
    yield
    until(lambda: pw.health().status == "ok", "all is in order again")


def test_everything_in_order_is_ok_and_says_with_what(runtime: Path) -> None:
    report = until(lambda: (r := pw.health()).status == "ok" and r, "all is in order")
    assert isinstance(report, pw.HealthReport)
    names = "ray controller anchors pool storage runs timers breakers".split()
    assert [check.name for check in report.checks] == names
    assert all(check.status == "ok" and check.why and check.remedy is None for check in report.checks)
    assert report["ray"].details["cpus"] == 2
    assert report["pool"].details["actors"] >= 1
    assert report["storage"].details["sync_s"] > 0
    assert not list((runtime / "tmp").glob("*.probe"))


def test_a_hung_controller_is_reported_with_its_process_and_not_waited_for() -> None:
    pid = controller_pid()
    with stopped(pid):
        began = time.monotonic()
        report = pw.health(timeout=LIMIT_S)
        took = time.monotonic() - began
    assert took < 2 * LIMIT_S + 1
    assert report.status == "failing"
    assert [check.name for check in report.checks if check.status == "failing"] == ["controller"]
    check = report["controller"]
    assert f"pid {pid} on node" in check.why
    assert check.remedy is not None
    assert check.remedy.startswith(f"kill -9 {pid}: ")
    assert report["pool"].status == "ok"  # the run actors live on, and say so themselves


@pytest.mark.slow
def test_a_killed_controller_is_missed_until_ray_has_restarted_it() -> None:
    pid = controller_pid()
    kill(pid)
    seen = [pw.health(timeout=LIMIT_S)]
    until(lambda: seen.append(pw.health()) or seen[-1].status == "ok", "it is back")
    assert seen[-1]["controller"].details["pid"] != pid
    missed = [report["controller"] for report in seen if report["controller"].status != "ok"]
    assert missed, "it came back between the kill and the first look"
    assert all(check.remedy for check in missed)


@pytest.mark.slow
def test_a_hung_run_actor_is_named() -> None:
    actors = descendants("RunActor")
    with stopped(actors[0]):
        check = pw.health(timeout=LIMIT_S)["pool"]
    assert check.status == ("degraded" if len(actors) > 1 else "failing")
    assert f"pid {actors[0]}" in check.why


@pytest.mark.slow
def test_a_hung_anchor_is_failing() -> None:
    with stopped(one("Anchor")):
        report = pw.health(timeout=LIMIT_S)
    assert report["anchors"].status == "failing"
    assert report["controller"].status == "ok"


@pytest.mark.slow
def test_a_hung_head_is_reported_and_the_storage_is_still_asked() -> None:
    with stopped(one("gcs_server")):
        report = pw.health(timeout=LIMIT_S)
    assert report["ray"].status == "failing"
    assert "no answer within 3s" in report["ray"].why
    assert report["controller"].status == "skipped"
    assert report["storage"].status == "ok"


def test_an_open_breaker_is_degraded_and_named() -> None:
    breaker = pw.CircuitBreaker("health-test", failure_threshold=1)
    breaker.force_open()
    try:
        report = pw.health()
        assert report.status == "degraded"
        assert report  # it works, and somebody should look
        assert "health-test is forced open until a person resets it" in report["breakers"].why
    finally:
        breaker.reset()


def test_the_state_of_ray_without_this_process(runtime: Path) -> None:
    from pyworkflow_ray.health import examine

    address = ray.get_runtime_context().gcs_address
    assert examine(runtime, address, None)["ray"].details["address"] == address
