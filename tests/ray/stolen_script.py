"""An owner that lives while its runs are taken from it: answers what it is asked on stdin, a line each.

python stolen_script.py STORAGE TEMP FOLDER. "states" gives what its controller has in its books, "recover" the ids that
`recover()` takes.
"""

from __future__ import annotations

import json
import os
import sys
import time

import pyworkflow_ray as pw
from pyworkflow_ray.runtime.client import current


def note(folder: str, line: str) -> None:
    fd = os.open(f"{folder}/ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)


@pw.step(num_cpus=0.1)
def work(folder: str, name: str, i: int) -> int:
    fence = "-".join(map(str, pw.current_step().fence))
    note(folder, f"{name} {i} {fence}")
    deadline = time.monotonic() + 60
    while i == 1 and not os.path.exists(f"{folder}/gate") and time.monotonic() < deadline:
        time.sleep(0.005)
    return i


@pw.workflow
async def held(folder: str, name: str) -> int:
    return sum([await work(folder, name, i) for i in range(4)])


@pw.workflow
async def sleeper(folder: str, name: str) -> int:
    first = await work(folder, name, 0)
    await pw.sleep("20s")
    return first + await work(folder, name, 2)


def main(storage: str, temp: str, folder: str) -> None:
    options = {
        "num_cpus": 2,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    with pw.init(storage=storage, address="local", ray_options=options):
        pw.start(sleeper.options(run_id="sleeper"), folder, "sleeper")
        client = current()
        assert client is not None
        while client.call("states", None).get("sleeper") != "parked":
            time.sleep(0.02)
        for number in range(3):  # two have run actors, one waits for one
            pw.start(held.options(run_id=f"held-{number}"), folder, f"held-{number}")
        print("started", flush=True)
        for line in sys.stdin:
            what = client.call("states", None) if line.strip() == "states" else [h.run_id for h in pw.recover()]
            print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
