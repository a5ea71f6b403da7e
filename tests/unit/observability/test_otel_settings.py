"""The standard variables: what they ask for, and what they cost where they ask for nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.current import is_sampled
from pyworkflow_ray.observability.otel_settings import Signals, signals, travelling


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, Signals()),
        ({"OTEL_SERVICE_NAME": "shop"}, Signals()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, Signals(("otlp",), ("otlp",))),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, Signals(("otlp",))),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, Signals(("otlp", "console"))),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, Signals((), ("prometheus",))),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, Signals((), ("otlp",))),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, Signals()),
    ],
)
def test_signals_are_asked_for_by_the_standard_variables(environ: dict[str, str], asked: Signals) -> None:
    assert signals(environ) == asked
    assert bool(travelling(environ)) == bool(asked)


def test_unknown_exporter_is_named() -> None:
    with pytest.raises(ConfigurationError, match="OTEL_TRACES_EXPORTER='zipkin': exporter 'zipkin' is not available"):
        signals({"OTEL_TRACES_EXPORTER": "zipkin"})


def test_sampling_is_the_callers_else_that_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert is_sampled(trace, "")
    assert not is_sampled(trace, f"00-{trace}-00f067aa0ba902b7-00")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert not is_sampled(trace, "")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    ids = [f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}" for number in range(1, 200)]
    sampler = TraceIdRatioBased(0.5)
    expected = [sampler.should_sample(None, int(one, 16), "run").decision.is_sampled() for one in ids]
    assert [is_sampled(one, "") for one in ids] == expected
    assert 60 < sum(expected) < 140


def test_nothing_asked_for_loads_no_opentelemetry() -> None:
    """In a worker's path: the process state, a run's start, an attempt."""
    code = (
        "import sys\n"
        "from pyworkflow_ray.execution.context import StepContext, entered, trace_attempts\n"
        "from pyworkflow_ray.observability import current\n"
        "import pyworkflow_ray.observability.otel_settings, pyworkflow_ray.runtime.observer\n"
        "trace_attempts(current.entering, current.leaving)\n"
        "assert current.caller() == ''\n"
        "with entered(StepContext('a', 1, 'k', (0, 1, 1), run_id='r', trace_id='1' * 32, position='1')): pass\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
