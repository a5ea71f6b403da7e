"""An OTLP receiver over HTTP: decodes what really came over the wire, and can be made to refuse."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass
class Received:
    """One span as it arrived."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    status: int
    message: Any = None


@dataclass
class Receiver:
    port: int
    spans: list[Received] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refusing: bool = False
    refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of_trace(self, trace_id: str) -> list[Received]:
        with self.lock:
            return [span for span in self.spans if span.trace_id == trace_id]

    def take(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        if path == "/v1/metrics":
            request = ExportMetricsServiceRequest.FromString(body)
            with self.lock:
                self.metrics.append(request)
            return ExportMetricsServiceResponse().SerializeToString()
        if path == "/alert":
            with self.lock:
                self.alerts.append(json.loads(body))
            return b""
        assert path == "/v1/traces", path
        request = ExportTraceServiceRequest.FromString(body)
        with self.lock:
            self.headers.append(headers)
            for resource in request.resource_spans:
                about = plain(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [received(span, about) for span in scope.spans]
        return ExportTraceServiceResponse().SerializeToString()


def received(span: Any, resource: dict[str, Any]) -> Received:
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        plain(span.attributes),
        resource,
        span.status.code,
        span,
    )


def plain(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


@contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    """A receiver on a free port of this machine, for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if receiver.refusing:
                with receiver.lock:
                    receiver.refused += 1
                self.send_response(400)  # not one that an exporter repeats by itself
                self.end_headers()
                return
            answer = receiver.take(self.path, body, dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(server.server_address[1])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
