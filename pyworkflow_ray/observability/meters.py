"""OpenTelemetry's instruments for what is measured, and the exporters that the standard variables ask for.

Made by the observer process, the one of a storage that measures. Faults: the exporter's package is missing, or the
port of the Prometheus endpoint is taken: said once with the remedy, and the other exporters go on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.measures import INSTRUMENTS, Measure
from pyworkflow_ray.observability.spans import _imported, default_resource, otlp_protocol

log = logging.getLogger("pyworkflow_ray.observer")

DEFAULT_PORT = 9464  # of OTEL_EXPORTER_PROMETHEUS_PORT
Gauge = tuple[float, dict[str, Any]]  # value, attributes


class Meters:
    """All instruments. Thread-safe: measurements come from one thread, scrapes from others."""

    def __init__(self, readers: list[MetricReader]) -> None:
        views = [
            View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(one.bounds))
            for name, one in INSTRUMENTS.items()
            if one.kind == "histogram"
        ]
        self._provider = MeterProvider(readers, default_resource(), views=views, shutdown_on_exit=False)
        meter = self._provider.get_meter("pyworkflow_ray")
        self._add: dict[str, Any] = {}
        self._gauges: dict[str, list[Gauge]] = {}
        self._lock = threading.Lock()
        for name, one in INSTRUMENTS.items():
            if one.kind == "counter":
                self._add[name] = meter.create_counter(name, one.unit, one.text).add
            elif one.kind == "histogram":
                self._add[name] = meter.create_histogram(name, one.unit, one.text).record
            else:
                meter.create_observable_gauge(name, [self._observing(name)], one.unit, one.text)

    def add(self, measures: Iterable[Measure]) -> None:
        for measure in measures:
            self._add[measure.name](measure.value, measure.attributes)

    def show(self, name: str, gauges: list[Gauge]) -> None:
        """All values of a gauge from now on; those with attributes that are not among them are gone."""
        assert INSTRUMENTS[name].kind == "gauge", name
        with self._lock:
            self._gauges[name] = gauges

    def _observing(self, name: str) -> Any:
        def observe(options: CallbackOptions) -> list[Observation]:
            with self._lock:
                return [Observation(value, attributes) for value, attributes in self._gauges.get(name, ())]

        return observe

    def flush(self, timeout_s: float) -> None:
        self._provider.force_flush(round(timeout_s * 1000))


def make_readers(names: Iterable[str], environ: Mapping[str, str]) -> list[MetricReader]:
    """A reader for each of "otlp", "prometheus" and "console"; one that can't be had is logged and left out."""
    readers = []
    for name in names:
        try:
            readers.append(_make_reader(name, environ))
        except (ConfigurationError, OSError) as error:
            log.error("metrics are not exported by %s: %s", name, error)
    return readers


def _make_reader(name: str, environ: Mapping[str, str]) -> MetricReader:
    if name == "prometheus":
        return _prometheus(environ)
    if name == "console":
        import sys

        return PeriodicExportingMetricReader(ConsoleMetricExporter(out=sys.stderr))
    grpc = otlp_protocol(environ, "METRICS") == "grpc"
    module = f"opentelemetry.exporter.otlp.proto.{'grpc' if grpc else 'http'}.metric_exporter"
    return PeriodicExportingMetricReader(_imported(module, "OTLPMetricExporter")())


def _prometheus(environ: Mapping[str, str]) -> MetricReader:
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigurationError(
            "a Prometheus endpoint is asked for, but its exporter is not installed: "
            "pip install 'pyworkflow-ray[prometheus]'"
        ) from error
    host = environ.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "localhost"
    given = environ.get("OTEL_EXPORTER_PROMETHEUS_PORT") or str(DEFAULT_PORT)
    if not given.isdigit() or not 0 < int(given) < 65536:
        raise ConfigurationError(f"OTEL_EXPORTER_PROMETHEUS_PORT={given!r} is no port: give 1 to 65535")
    registry = CollectorRegistry()
    reader = PrometheusMetricReader(registry=registry)
    try:
        start_http_server(int(given), addr=host, registry=registry)
    except OSError as error:
        raise ConfigurationError(
            f"no Prometheus endpoint at {host}:{given} ({error.strerror}): set OTEL_EXPORTER_PROMETHEUS_PORT to a free "
            "one"
        ) from error
    return reader
