"""A driver of its own, with OTEL_* in its environment: starts runs below a span of its own, and ends.

python trace_script.py STORAGE ADDRESS FOLDER COUNT
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(storage: str, address: str, folder: str, count: str) -> None:
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import trace_flows
    from opentelemetry.sdk.trace import TracerProvider

    import pyworkflow_ray as pw

    pw.init(storage=storage, address=address, pool_min=2)
    with TracerProvider().get_tracer("caller").start_as_current_span("request") as span:
        for number in range(int(count)):
            (Path(folder) / str(number)).mkdir()
            pw.start(trace_flows.traced.options(run_id=f"traced-{number}"), str(Path(folder) / str(number)))
        pw.start(trace_flows.declined.options(run_id="declined-0"), "o-1")
        context = span.get_span_context()
    print(f"{context.trace_id:032x} {context.span_id:016x}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
