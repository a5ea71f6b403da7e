"""A second owner: a process with a Ray of its own that calls `recover` when told, and reports what it took.

python taker.py STORAGE TEMP. Each line on stdin is one `recover()`; it answers with the run ids as JSON, and goes on
until stdin ends. It then waits for what it took.
"""

from __future__ import annotations

import json
import sys

import pyworkflow_ray as pw


def main(storage: str, temp: str) -> None:
    options = {
        "num_cpus": 2,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    with pw.init(storage=storage, address="local", ray_options=options):
        print("ready", flush=True)
        taken: list[pw.RunHandle[list[int]]] = []
        for _ in sys.stdin:
            handles = pw.recover()
            taken += handles
            print(json.dumps([handle.run_id for handle in handles]), flush=True)
        print(json.dumps([handle.result(60) for handle in taken]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
