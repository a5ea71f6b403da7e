"""Telemetry in a process of ours: the variables that travelled, the attempt's span as the current one, users' spans.

Called by `process` as it is entered. Where nothing is asked for, no OpenTelemetry is loaded: an attempt costs one look
into `sys.modules`, which is there for users who bring a tracer of their own.
"""

from __future__ import annotations

import os
from typing import Any

from pyworkflow_ray.execution.context import StepContext, trace_attempts
from pyworkflow_ray.observability import current
from pyworkflow_ray.observability.otel_settings import signals
from pyworkflow_ray.runtime.messages import RuntimeConfig


def enter_telemetry(config: RuntimeConfig) -> None:
    """Once a process and configuration."""
    for name, value in config.telemetry:
        os.environ.setdefault(name, value)
    if signals(dict(config.telemetry)).traces and "://" not in config.storage:
        trace_attempts(_Recording(config.storage), current.leaving)
    else:
        trace_attempts(current.entering, current.leaving)


class _Recording:
    """As `current.entering`; first has users' spans recorded, for only now their code is loaded."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._ready = 0  # the process in which it is

    def __call__(self, step: StepContext) -> Any:
        if self._ready != os.getpid():
            self._ready = os.getpid()
            current.record_spans(self._root)
        return current.entering(step)
