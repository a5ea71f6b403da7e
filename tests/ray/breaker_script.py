"""A process with a cluster of its own, which it ends: a failing call, then the breaker as it is.

python breaker_script.py STORAGE TEMP FAILURES
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path


def main(storage: str, temp: str, failures: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import pyworkflow_ray as pw
    from pyworkflow_ray.storage.breaker_states import BreakerStates

    options = {
        "num_cpus": 1,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    pw.init(storage=storage, address="local", ray_options=options)
    breaker = pw.CircuitBreaker("restarted", failure_threshold=1, recovery_timeout=600)
    for _ in range(int(failures)):
        with contextlib.suppress(ConnectionError), breaker:
            raise ConnectionError("503 before the restart")
    snapshot = breaker.snapshot()
    while BreakerStates(storage, "restarted").load() is None:
        time.sleep(0.01)
    print(json.dumps([snapshot.state, snapshot.reason, snapshot.retry_after, snapshot.generation]), flush=True)
    pw.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
