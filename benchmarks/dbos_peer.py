"""DBOS at the same work, in a process of its own: `python -m benchmarks.dbos_peer DATABASE_URL`.

Called by `benchmarks.retries`, which writes lines "RUNS STEPS" and reads the seconds that they took. DBOS keeps the end
of a step, and no record of its attempts.
"""

from __future__ import annotations

import sys
import time

from dbos import DBOS

from benchmarks.flaky import FEW


@DBOS.step(retries_allowed=True, max_attempts=FEW, interval_seconds=0.0, backoff_rate=1.0)
def flaky(order: int) -> int:
    """Fails four times, then succeeds."""
    attempt = (DBOS.step_status.current_attempt if DBOS.step_status is not None else None) or 0
    if attempt < FEW - 1:
        raise ConnectionError(f"503 from payments, order {order}")
    return attempt + 1


@DBOS.workflow()
def in_a_row(steps: int, first: int) -> int:
    """Flaky steps, one after another."""
    return sum(flaky(first + n) for n in range(steps))


def main() -> None:
    """Answer each line until the input ends."""
    DBOS(
        config={
            "name": "retries",
            "system_database_url": sys.argv[1],
            "log_level": "CRITICAL",
            "enable_otlp": False,
        }
    )
    DBOS.launch()
    print("ready", flush=True)
    for line in sys.stdin:
        runs, steps = map(int, line.split())
        began = time.perf_counter()
        handles = [DBOS.start_workflow(in_a_row, steps, n * steps) for n in range(runs)]
        for handle in handles:
            assert handle.get_result() == steps * FEW
        print(time.perf_counter() - began, flush=True)
    DBOS.destroy()


if __name__ == "__main__":
    main()
