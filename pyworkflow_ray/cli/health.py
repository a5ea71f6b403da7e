"""`health`: the checks of `pw.health()`, once or watched on a terminal, or served over HTTP.

Exit code 1 where a check is failing (with --strict also where one is degraded), else 0. Faults: those that it reports.
What hangs is left behind in its thread, and the process ends without it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.screen import Screen, note_line, to_json
from pyworkflow_ray.health import THREAD

if TYPE_CHECKING:
    from pyworkflow_ray.observability.health import HealthReport

STATE_STYLES = {"ok": "completed", "degraded": "retrying", "failing": "failed", "skipped": "pending"}
VERDICT_STYLES = {"ok": "green", "degraded": "yellow", "failing": "bold red"}
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@click.command()
@click.option("--timeout", type=opt.DURATION, help="What each check may take. Default: 5s, 15s for reaching Ray.")
@click.option("--strict", is_flag=True, help="Exit with 1 where something is degraded, too.")
@click.option("--serve", "port", type=click.IntRange(0, 65535), metavar="PORT", help="Answer /livez, /readyz, /health.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --serve: the address to listen on.")
@click.option("--address", help="A Ray cluster. Default: RAY_ADDRESS, a running local cluster.")
@opt.watch_options
@opt.json_option
@opt.storage_option
def health(
    timeout: float | None,
    strict: bool,
    port: int | None,
    host: str,
    address: str | None,
    watch: bool,
    interval: float,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Check Ray, controller, anchors, run actors, storage (a real write), stuck runs, timers and breakers.

    Each check has a time limit of its own: what hangs is reported, not waited for. Nothing is started. With --serve
    PORT it stays and answers GET /livez (this process works), /readyz (503 while a check is failing), /health (JSON).
    """
    from pyworkflow_ray.health import examine

    def look() -> HealthReport:
        return examine(storage_path, address, timeout)

    if port is not None:
        from pyworkflow_ray.cli.health_server import serve

        if host not in LOOPBACK:
            note_line(
                f"{host} can be reached from other machines: /health tells them run ids, paths and error messages"
            )
        serve(look, host, port, lambda bound: note_line(f"health on http://{_shown(host)}:{bound}/readyz"))
        return 0
    screen = Screen()
    while True:
        report = look()
        _print(screen, report, as_json)
        screen.flush()
        if not watch:
            return 1 if report.status == "failing" or (strict and report.status != "ok") else 0
        time.sleep(max(0.1, interval))
        screen.clear()


def _print(screen: Screen, report: HealthReport, as_json: bool) -> None:
    from pyworkflow_ray.observability.health import COLUMNS, MARKS, check_rows

    if as_json:
        screen.raw(to_json(report.model_dump(mode="json")))
        return
    screen.marked(MARKS[report.status], report.verdict, VERDICT_STYLES[report.status])
    rows = check_rows(report)
    if screen.terminal:  # a remedy is never cut: it has a line of its own
        screen.table(COLUMNS[:3], [row[:3] for row in rows], [STATE_STYLES[check.status] for check in report.checks])
        for check in report.checks:
            if check.remedy:
                screen.wrapped(f"do     {check.name}: ", check.remedy, "dim")
        return
    screen.table(COLUMNS, rows, [STATE_STYLES[check.status] for check in report.checks])


def leave_what_hangs(code: int) -> None:
    """End this process at once where a question still hangs: Ray's own end would wait for the head that is silent."""
    if any(thread.name == THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
