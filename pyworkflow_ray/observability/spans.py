"""Finished spans as OpenTelemetry's own, and the exporters that the standard environment variables ask for.

Nothing is kept between calls: a run's spans follow from its events (`trace`), so a killed process loses none and a
resumed run continues its trace. Called by handles, the command line and the observer process.

Fault: an exporter refuses, or its package is missing; the error names which, and what to install.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.spandata import SpanData
from pyworkflow_ray.observability.spandata import attempt_span_id as attempt_span_id
from pyworkflow_ray.observability.spandata import run_span_id as run_span_id
from pyworkflow_ray.observability.spandata import step_span_id as step_span_id
from pyworkflow_ray.observability.trace import trace_spans

SCOPE = InstrumentationScope("pyworkflow_ray")
_CODES = {"ok": StatusCode.OK, "unset": StatusCode.UNSET, "error": StatusCode.ERROR}
_DEFAULT_NAME = {"service.name": "pyworkflow-ray"}


def run_spans(events: Sequence[ev.Event], *, resource: Resource | None = None) -> list[ReadableSpan]:
    """The finished spans of a run: attempts, waits and steps that have ended and, once the run has, its root.

    A span is finished or absent, so that exporting a run's spans as it goes on repeats none with other contents; what a
    lost worker began is a span that ends with an error when the loss was recorded.

    Args:
        events: The run's accepted events in order.
        resource: Describes the process that exports (default: by `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`).
    """
    resource = resource if resource is not None else default_resource()
    return [readable(span, resource) for span in trace_spans(events)]


def export_run(
    events: Sequence[ev.Event],
    exporter: SpanExporter,
    *,
    already: Iterable[str] = (),
    resource: Resource | None = None,
) -> list[str]:
    """Export the finished spans of a run; returns their ids.

    Args:
        events: The run's accepted events in order.
        exporter: Any `SpanExporter`.
        already: Span ids to leave out: what an earlier call returned.
        resource: As for `run_spans`.

    Raises:
        RuntimeError: the exporter reported a failure; call again with the same `already`.
    """
    known = set(already)
    spans = [s for s in run_spans(events, resource=resource) if _hex_id(s) not in known]
    send(spans, exporter)
    return [_hex_id(span) for span in spans]


def send(spans: Sequence[ReadableSpan], exporter: SpanExporter) -> None:
    """Hand spans to an exporter.

    Raises:
        RuntimeError: it reported a failure.
    """
    if spans and exporter.export(spans) is not SpanExportResult.SUCCESS:
        raise RuntimeError(f"{type(exporter).__name__} did not take {len(spans)} spans")


def default_resource() -> Resource:
    """By `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`; the service is called pyworkflow-ray where they do not
    say."""
    made = Resource.create()
    unnamed = str(made.attributes.get("service.name", "")).startswith("unknown_service")
    return made.merge(Resource(_DEFAULT_NAME)) if unnamed else made


def readable(span: SpanData, resource: Resource) -> ReadableSpan:
    """OpenTelemetry's own span. `resource` is that of spans that bring none."""
    parent = None if span.parent_id is None else _context(span.trace_id, span.parent_id, remote=span.remote_parent)
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=parent,
        resource=resource if span.resource is None else _resource(tuple(sorted(span.resource.items()))),
        attributes=span.attributes,
        events=[SpanEvent(name, attributes, at) for name, at, attributes in span.events],
        links=[Link(_context(trace, own), attributes) for trace, own, attributes in span.links],
        kind=SpanKind[span.kind],
        status=Status(_CODES[span.status], span.description or None if span.status == "error" else None),
        start_time=span.start,
        end_time=span.end,
        instrumentation_scope=SCOPE if span.scope is None else InstrumentationScope(*span.scope),
    )


def span_data(span: ReadableSpan) -> SpanData:
    """The plain data of a user's span, so that `readable` gives it again."""
    context, scope = span.get_span_context(), span.instrumentation_scope
    assert context is not None
    return SpanData(
        span.name,
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        None if span.parent is None else f"{span.parent.span_id:016x}",
        span.start_time or 0,
        span.end_time or span.start_time or 0,
        _plain(span.attributes),
        span.status.status_code.name.lower(),  # type: ignore[arg-type]
        span.status.description or "",
        [(event.name, event.timestamp, _plain(event.attributes)) for event in span.events],
        [(f"{n.context.trace_id:032x}", f"{n.context.span_id:016x}", _plain(n.attributes)) for n in span.links],
        span.kind.name,
        remote_parent=span.parent is not None and span.parent.is_remote,
        resource=_plain(span.resource.attributes),
        scope=None if scope is None else (scope.name, scope.version or ""),
    )


def make_exporters(names: Sequence[str], environ: Mapping[str, str]) -> list[SpanExporter]:
    """An exporter each of "otlp" and "console", as `OTEL_EXPORTER_OTLP_*` say.

    Raises:
        ConfigurationError: an exporter of another name, or one whose package is not installed.
    """
    return [_make_exporter(name, environ) for name in names]


def _make_exporter(name: str, environ: Mapping[str, str]) -> SpanExporter:
    if name == "console":
        import sys

        return ConsoleSpanExporter(out=sys.stderr)
    if name != "otlp":
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER={name!r} is not available in this version: otlp, console, none")
    exporter: type[SpanExporter]
    if otlp_protocol(environ, "TRACES") == "grpc":
        exporter = _imported("opentelemetry.exporter.otlp.proto.grpc.trace_exporter", "OTLPSpanExporter")
    else:
        exporter = _imported("opentelemetry.exporter.otlp.proto.http.trace_exporter", "OTLPSpanExporter")
    return exporter()


def otlp_protocol(environ: Mapping[str, str], signal: str) -> str:
    """`OTEL_EXPORTER_OTLP_PROTOCOL`, or the signal's own.

    Raises:
        ConfigurationError: none that we speak.
    """
    variable = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not environ.get(variable):
        variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = environ.get(variable) or "http/protobuf"
    if protocol not in ("http/protobuf", "grpc"):
        raise ConfigurationError(f"{variable}={protocol!r} is not available in this version: http/protobuf, grpc")
    return protocol


def _imported(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        grpc = ".grpc." in module
        package = "opentelemetry-exporter-otlp-proto-grpc" if grpc else "'pyworkflow-ray[otlp]'"
        raise ConfigurationError(
            f"OTLP is asked for, but its exporter is not installed: pip install {package}"
        ) from error


@lru_cache(maxsize=64)
def _resource(attributes: tuple[tuple[str, Any], ...]) -> Resource:
    return Resource(dict(attributes))


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        name: value if isinstance(value, (str, bool, int, float)) else tuple(value) if _is_row(value) else str(value)
        for name, value in (attributes or {}).items()
    }


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, (str, bool, int, float)) for one in value)


def _context(trace_id: str, own_id: str, *, remote: bool = False) -> SpanContext:
    sampled = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int(trace_id, 16), int(own_id, 16), is_remote=remote, trace_flags=sampled)


def _hex_id(span: ReadableSpan) -> str:
    context = span.context
    return "" if context is None else f"{context.span_id:016x}"
