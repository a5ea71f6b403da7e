"""How long a run of many events takes to resume, beside reading and decoding its file: `python -m benchmarks.resume`.

The history is a real one, of a workflow of that many steps, made without Ray. Compared, in turns: reading the journal
and decoding its events (the floor), and what an owner does to go on: `Storage.activate` (read, take over, read again)
and the engine's replay. With `--checkpoint` the same for a run whose closed epochs lie in Parquet.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyworkflow_ray import step, workflow
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import Event, RunActivated
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.record import chain_start, decode_records, parse_event
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.testing import WorkflowEnv


@step
async def add(total: int, number: int) -> int:
    return total + number


@workflow
async def count(steps: int) -> int:
    total = 0
    for number in range(steps):
        total = await add(total, number)
    return total


def history(events: int) -> list[Event]:
    """Events of a run of `count` that has not ended: about so many."""
    with WorkflowEnv() as env:
        env.limits = Limits(warn_events=10**9, max_events=10**9)
        handle = env.start(count, events // 3)
        handle.result()
        return list(handle.events())[:-1]


def write(storage: Storage, events: list[Event]) -> None:
    """The history as the journal of run "long", in commits of 100 events."""
    created = events[0].model_copy(update={"run_id": "long", "storage_id": storage.storage_id})
    storage.create_run(created)  # type: ignore[arg-type]
    journal, _ = storage.activate("long", "", first=True)
    for start in range(1, len(events), 100):
        journal.append(events[start : start + 100]).result()
    journal.close()


def floor(storage: Storage) -> int:
    """Read the file of epoch 0 and decode its events."""
    data = storage.disk.read(storage.place("long").path(0))
    decoded = decode_records(data, chain_start(storage.storage_id, "long", 0))
    return len([parse_event(body) for body in decoded.bodies[1:]])


def resume(storage: Storage) -> int:
    """Go on with the run, to where it would do something new."""
    journal, events = storage.activate("long", "")
    driver = Driver(count.fn, StorageCodec(storage), limits=Limits(), rng=random.Random(0))
    driver.activate(events, RunActivated(epoch=journal.epoch, cause="recovery"), time.time())
    assert driver.effects()
    journal.close()
    driver.evict()
    return len(events)


def timed(call: Callable[[Storage], int], storage: Storage) -> float:
    began = time.perf_counter()
    call(storage)
    return time.perf_counter() - began


def measure(floor_root: str, resume_root: str, rounds: int) -> dict[str, Any]:
    """Both, in turns."""
    storage, resumed = Storage.open(floor_root), Storage.open(resume_root)
    floors: list[float] = []
    resumes: list[float] = []
    events = 0
    for _ in range(rounds):
        floors.append(timed(floor, storage))
        resumes.append(timed(resume, resumed))
        events = len(storage.read_run("long").events)
    return {
        "events": events,
        "read and decode, s": round(statistics.median(floors), 3),
        "resume, s": round(statistics.median(resumes), 3),
        "ratio": round(statistics.median(b / a for a, b in zip(floors, resumes, strict=True)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given.rounds)))
        return
    with tempfile.TemporaryDirectory() as directory:
        roots = [f"{directory}/{name}" for name in ("a", "b")]
        events = history(given.events)
        for root in roots:
            write(Storage.open(root), events)
        if given.checkpoint:
            storage = Storage.open(roots[1])
            storage.activate("long", "")[0].close()
            compact(storage, Rules(live_bytes=1))
        # In a process whose memory holds nothing else, as a run actor's.
        command = [sys.executable, "-m", "benchmarks.resume", "--rounds", str(given.rounds), "--measure", *roots]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(found, end="")
        if given.json:
            Path(given.json).write_text(found)


if __name__ == "__main__":
    from benchmarks import resume as importable  # steps of __main__ would be shipped by value

    importable.main()
