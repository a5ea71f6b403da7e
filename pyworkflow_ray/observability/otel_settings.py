"""What the standard OpenTelemetry environment variables ask for. Pure: the variables are handed in.

Read once, by the process that connects to (or starts) Ray; its `OTEL_*` travel to every process of ours. Nothing is
asked for where no variable says so: unlike the SDK we do not send to localhost by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyworkflow_ray.errors import ConfigurationError

PREFIX = "OTEL_"
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES = ("otlp", "console")
_METRICS = ("otlp", "prometheus", "console")


@dataclass(frozen=True, slots=True)
class Signals:
    """Exporters of each signal, by the names that OpenTelemetry gives them; none: the signal is off."""

    traces: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.traces or self.metrics)


def signals(environ: Mapping[str, str]) -> Signals:
    """Which signals are exported, and whither.

    `OTEL_TRACES_EXPORTER` and `OTEL_METRICS_EXPORTER` name exporters (several with commas, or none); without them an
    `OTEL_EXPORTER_OTLP_ENDPOINT`, or the signal's own, asks for otlp. `OTEL_SDK_DISABLED=true` switches all off.

    Raises:
        ConfigurationError: an exporter is unknown.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Signals()
    return Signals(_exporters(environ, "TRACES", _TRACES), _exporters(environ, "METRICS", _METRICS))


def _exporters(environ: Mapping[str, str], signal: str, known: tuple[str, ...]) -> tuple[str, ...]:
    variable = f"OTEL_{signal}_EXPORTER"
    named = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]
    if not named:
        endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or environ.get(_ENDPOINT)
        return ("otlp",) if endpoint else ()
    if named == ["none"]:
        return ()
    for name in named:
        if name not in known:
            raise ConfigurationError(
                f"{variable}={environ[variable]!r}: exporter {name!r} is not available in this version: "
                f"{', '.join(known)}, none"
            )
    return tuple(dict.fromkeys(named))


def travelling(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that every process of ours is to have, sorted; none where nothing is asked for."""
    if not signals(environ):
        return ()
    return tuple(sorted((name, value) for name, value in environ.items() if name.startswith(PREFIX)))
