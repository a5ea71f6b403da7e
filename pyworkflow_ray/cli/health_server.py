"""Health over HTTP, for a load balancer, Kubernetes or a monitor. Standard library only.

Called by `health --serve`. `GET` and `HEAD`:

* `/livez`: 200 while this process works; 503 once a report has been under way for so long that it never ends: only a
  restart of this process helps then. What it watches is not asked.
* `/readyz`: 200 while nothing is failing, 503 with the names of what is.
* `/health`: the whole report as JSON, 200 or 503 likewise.

One report is made at a time, and serves whoever asks within a second. Faults: many askers at once (they share one
report), an asker that goes away, checks that hang (their own limits).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyworkflow_ray.observability.health import HealthReport

KEPT_S = 1.0
HUNG_S = 120.0  # more than all limits together


class Reports:
    """Makes reports, one at a time."""

    def __init__(self, look: Callable[[], HealthReport], clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._clock = clock
        self._one = threading.Lock()
        self._last: HealthReport | None = None
        self._made_at = float("-inf")
        self._began_at: float | None = None

    def report(self) -> HealthReport:
        """The last report while it is fresh, else a new one."""
        with self._one:
            if self._last is None or self._clock() - self._made_at > KEPT_S:
                self._began_at = self._clock()
                try:
                    self._last = self._look()
                finally:
                    self._began_at = None
                self._made_at = self._clock()
            return self._last

    def hung_s(self) -> float | None:
        """For how long a report has been under way, where that is too long."""
        began_at = self._began_at
        spent = None if began_at is None else self._clock() - began_at
        return spent if spent is not None and spent > HUNG_S else None


def answer(reports: Reports, path: str) -> tuple[int, str, str]:
    """(status, content type, body) of a path."""
    route = path.partition("?")[0].rstrip("/")
    if route == "/livez":
        hung = reports.hung_s()
        return (200, "text/plain", "ok\n") if hung is None else (503, "text/plain", f"hung for {hung:.0f} s\n")
    if route not in ("/readyz", "/health"):
        return 404, "text/plain", "not here: /livez, /readyz, /health\n"
    report = reports.report()
    status = 503 if report.status == "failing" else 200
    if route == "/health":
        return status, "application/json", json.dumps(report.model_dump(mode="json")) + "\n"
    bad = [f"{check.name} {check.status}" for check in report.checks if check.status in ("failing", "degraded")]
    return status, "text/plain", f"{report.status}{': ' if bad else ''}{', '.join(bad)}\n"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reports: Reports, host: str, port: int) -> None:
        self.reports = reports
        if ":" in host:
            import socket

            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "pyworkflow-ray"
    sys_version = ""
    timeout = 30  # of an asker that says nothing

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def _respond(self, *, with_body: bool) -> None:
        try:
            status, kind, body = answer(self.server.reports, self.path)
        except Exception as error:  # a wrong setting, say: whoever asks is to hear of it
            status, kind, body = 503, "text/plain", f"failing: {type(error).__name__}: {error}\n"
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """A probe every second is no news."""


def serve(look: Callable[[], HealthReport], host: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer until Ctrl-C. port 0: any free one, told to `ready`."""
    with Server(Reports(look), host, port) as server:
        ready(server.server_address[1])
        server.serve_forever(poll_interval=0.5)
