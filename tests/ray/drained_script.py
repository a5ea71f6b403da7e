"""A driver of an embedded Ray whose run takes half a minute, for a SIGTERM in the middle.

python drained_script.py STORAGE TEMP LEDGER
"""

from __future__ import annotations

import os
import sys
import time

import pyworkflow_ray as pw


@pw.step
def slow(ledger: str, i: int) -> int:
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{i}\n".encode())
    os.close(fd)
    time.sleep(0.5)
    return 1


@pw.workflow
async def paced(ledger: str) -> int:
    return sum([await slow(ledger, i) for i in range(60)])


def main(storage: str, temp: str, ledger: str) -> None:
    options = {
        "num_cpus": 2,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    pw.init(storage=storage, address="local", ray_options=options)
    pw.start(paced.options(run_id="paced"), ledger)
    print("started", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
