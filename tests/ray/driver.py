"""A driver process of its own, for tests that kill it: starts runs on an embedded Ray and waits.

python driver.py STORAGE TEMP LEDGER GATE COUNT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(storage: str, temp: str, ledger: str, gate: str, count: str) -> None:
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import flows

    import pyworkflow_ray as pw

    options = {
        "num_cpus": 2,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    pw.init(storage=storage, address="local", ray_options=options)
    for number in range(int(count)):
        pw.start(flows.ten.options(run_id=f"run-{number}"), f"{ledger}-{number}", gate, 4)
    print("started", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
