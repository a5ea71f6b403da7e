"""A script whose workflow, steps and exception class live in `__main__`: starts runs on an embedded Ray and waits.

python main_script.py STORAGE TEMP LEDGER GATE COUNT
"""

from __future__ import annotations

import os
import sys
import time

import pyworkflow_ray as pw


class Declined(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def note(ledger: str, line: str) -> None:
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)


@pw.step(num_cpus=0.1)
def numbered(ledger: str, i: int, gate: str) -> int:
    note(ledger, f"step {i}")
    deadline = time.monotonic() + 60
    while i == 1 and not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.005)
    return i


@pw.step(num_cpus=0.1)
def decline(ledger: str, code: int) -> None:
    note(ledger, f"decline {code}")
    raise Declined(code=code)


async def caught(ledger: str, code: int) -> int:
    try:
        await decline(ledger, code)
    except Declined as error:
        return error.code
    return 0


@pw.workflow
async def orders(ledger: str, gate: str) -> list[int]:
    """Held at its second step until the file `gate` exists; catches its own exception before and after."""
    first = await caught(ledger, 3)
    numbers = [await numbered(ledger, i, gate) for i in range(3)]
    return [first, *numbers, await caught(ledger, 7)]


def main(storage: str, temp: str, ledger: str, gate: str, count: str) -> None:
    options = {
        "num_cpus": 2,
        "_temp_dir": temp,
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
        "log_to_driver": False,
    }
    pw.init(storage=storage, address="local", ray_options=options)
    for number in range(int(count)):
        pw.start(orders.options(run_id=f"run-{number}"), f"{ledger}-{number}", gate)
    print("started", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
