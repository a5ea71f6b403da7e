"""The services that the demo's checkout calls: payments, two stock systems, receipts. A real HTTP server process.

Started by `main` as `python -m pyworkflow_ray.demo.services --ledger FILE`; calls `ledger` and `faults`. It prints one
line of JSON, `{"port": …}`, once it listens on 127.0.0.1, and ends when its standard input does, so it never outlives
the demo.

    POST /payments/charges                  {"order_id", "amount", "currency", "card"}
    POST /stock/primary/reservations        {"order_id", "sku", "quantity"}      and /stock/fallback/reservations
    POST /receipts                          {"order_id", "email"}
    GET  /health

Each POST honours `Idempotency-Key`: the same key again gives the first answer and does nothing. Without a key each
request is a new one. What is done is durable before it is answered. It fails as `faults` says: 503, 429 with
Retry-After, late answers, dropped connections, some of them after the work is done; 402 for a card that is declined,
400 for a request that makes no sense, 409 for a key that comes back with another order.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pyworkflow_ray.demo.faults import Fault, fault
from pyworkflow_ray.demo.ledger import KeyReusedError, Ledger

DEFAULT_SEED = 11
RETRY_AFTER_S = 1
SLOW_S = 0.3
STUCK_S = 4.0

Answer = tuple[int, dict[str, Any]]
Body = dict[str, Any]


class Services(ThreadingHTTPServer):
    """The four services on one port. `port` is the one it got; the server runs once `serve_forever` is called.

    Args:
        ledger: The books; closed by the caller.
        seed: Decides who meets which fault.
        faulty: False makes a server that always answers.
        pause: How a late answer waits; tests hand in their own.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        ledger: Ledger,
        *,
        seed: int = DEFAULT_SEED,
        port: int = 0,
        faulty: bool = True,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.ledger = ledger
        self.pause = pause
        self._seed = seed
        self._faulty = faulty
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def next_fault(self, service: str, order_id: str, key: str) -> Fault:
        """Count the request, durably where it is one to the payment service, and say what happens to it."""
        if service == "payments":
            nth = self.ledger.request(key, order_id)
        else:
            with self._lock:
                self._asked[service, order_id] += 1
                nth = self._asked[service, order_id]
        return fault(self._seed, service, order_id, nth) if self._faulty else Fault.NONE

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of a request is the everyday case here; nothing is printed for it."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _charge(ledger: Ledger, key: str, body: Body) -> Answer:
    amount = Decimal(body["amount"])
    if not amount.is_finite() or amount <= 0:
        return 400, {"error": f"amount {body['amount']!r} is not above zero"}
    if body["card"] == "tok_declined":
        return 402, {"error": "card declined: insufficient funds"}
    replayed = not ledger.charge(key, body["order_id"], amount)
    return 200, {"charge": f"ch_{key[:16]}", "amount": str(amount), "replayed": replayed}


def _reserve(source: str) -> Callable[[Ledger, str, Body], Answer]:
    def reserve(ledger: Ledger, key: str, body: Body) -> Answer:
        replayed = not ledger.reserve(key, body["order_id"], body["sku"], int(body["quantity"]), source)
        return 200, {"source": source, "replayed": replayed}

    return reserve


def _receipt(ledger: Ledger, key: str, body: Body) -> Answer:
    replayed = not ledger.receipt(key, body["order_id"], body["email"])
    return 200, {"sent": body["email"], "replayed": replayed}


ROUTES: dict[str, tuple[str, Callable[[Ledger, str, Body], Answer]]] = {
    "/payments/charges": ("payments", _charge),
    "/stock/primary/reservations": ("stock/primary", _reserve("primary")),
    "/stock/fallback/reservations": ("stock/fallback", _reserve("fallback")),
    "/receipts": ("receipts", _receipt),
}


class _Handler(BaseHTTPRequestHandler):
    server: Services
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # header and body leave in one packet

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {"ok": self.path == "/health"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        route = ROUTES.get(self.path)
        if route is None:
            return self._answer(404, {"error": f"no such service: {self.path}"})
        service, work = route
        try:
            body = json.loads(raw)
            order_id = str(body["order_id"])
        except (ValueError, KeyError, TypeError):
            return self._answer(400, {"error": "a JSON object with an order_id is needed"})
        key = self.headers.get("Idempotency-Key") or uuid.uuid4().hex
        happens = self.server.next_fault(service, order_id, key)
        if happens is Fault.UNAVAILABLE:
            return self._answer(503, {"error": f"{service} is unavailable"})
        if happens is Fault.THROTTLED:
            return self._answer(429, {"error": "too many requests"}, {"Retry-After": str(RETRY_AFTER_S)})
        if happens is Fault.DROPPED:
            return self._drop()
        status, answer = self._work(work, key, body)
        if happens is Fault.DROPPED_AFTER:
            return self._drop()
        if happens in (Fault.SLOW, Fault.STUCK):
            self.server.pause(SLOW_S if happens is Fault.SLOW else STUCK_S)
        self._answer(status, answer)

    def _work(self, work: Callable[[Ledger, str, Body], Answer], key: str, body: Body) -> Answer:
        try:
            return work(self.server.ledger, key, body)
        except KeyReusedError as error:
            return 409, {"error": str(error)}
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            return 400, {"error": f"{type(error).__name__}: {error}"}

    def _answer(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def _drop(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main(arguments: list[str] | None = None) -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m pyworkflow_ray.demo.services", description=__doc__)
    parser.add_argument("--ledger", type=Path, required=True, help="SQLite file of requests and charges")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="decides who meets which fault")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    options = parser.parse_args(arguments)
    ledger = Ledger(options.ledger)
    server = Services(ledger, seed=options.seed, port=options.port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(json.dumps({"port": server.port}) + "\n")
    sys.stdout.flush()
    try:
        sys.stdin.buffer.read()
    except KeyboardInterrupt:
        pass
    server.shutdown()
    ledger.close()


if __name__ == "__main__":
    main()
