"""What telemetry costs a step, where nothing is asked for and where traces are: `python -m benchmarks.telemetry`.

Each line is the median of several rounds taken in turns. "before" is an attempt's context without any of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pyworkflow_ray.execution import context
from pyworkflow_ray.execution.context import KeyScope, StepContext, entered, trace_attempts
from pyworkflow_ray.observability import current

ROUNDS, CALLS = 15, 4_000
STEP = StepContext(
    "charge", 1, "key", (0, 1, 1), run_id="r", trace_id="1" * 32, position="3", _scope=KeyScope("s", "u")
)


def attempt() -> None:
    with entered(STEP):
        pass


def per_call(call: Callable[[], object]) -> float:
    """Microseconds."""
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS * 1e6


def in_turns(cases: dict[str, tuple[Callable[[], object], Callable[[], object]]]) -> dict[str, float]:
    """Median of each case: (what prepares it, what is timed)."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (prepare, call) in cases.items():
            prepare()
            taken[name].append(per_call(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def off() -> None:
    context._tracing = None


def on() -> None:
    trace_attempts(current.entering, current.leaving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    assert not any(name.startswith("opentelemetry") for name in sys.modules)
    silent = in_turns(
        {
            "attempt, before": (off, attempt),
            "attempt, nothing asked for": (on, attempt),
            "start of a run, nothing asked for": (on, current.caller),
        }
    )
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    with tempfile.TemporaryDirectory() as root:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(current.processor(current.Spool(root)))
        tracer: trace.Tracer = provider.get_tracer("bench")

        def with_span() -> None:
            with entered(STEP), tracer.start_as_current_span("mine"):
                pass

        asked = in_turns(
            {
                "attempt, traces asked for": (on, attempt),
                "attempt with a span of the user's, written down": (on, with_span),
            }
        )
    figures = {**silent, **asked}
    for name, median in figures.items():
        print(f"{name:<50} {median:8.2f} µs")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
