"""Runs in a bucket under injected latency: chains of steps, strict and relaxed, and events a second by group commit.

    python -m benchmarks.storage_objects [--json FILE]

A small S3 server in a process of its own adds the latency to each of its answers. The run is driven by what a run
actor drives it with (driver, shell, journal); the steps are sleeps of a known length, so that what remains is the
storage's. The aim for n relaxed steps: at most 1.5 × latency + n × step time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import time
from pathlib import Path
from typing import Any

from benchmarks.object_server import BUCKET, environment, tiny_server
from pyworkflow_ray import step
from pyworkflow_ray.engine.calls import Outcome, StepCall
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import CodeEnvironment, CodeRef, RunCreated, TimerFired
from pyworkflow_ray.ids import new_id
from pyworkflow_ray.runtime.active_run import ActiveRun
from pyworkflow_ray.runtime.messages import Assignment
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.port import JournalPort, StoragePort, open_storage

LATENCIES_S = (0.0002, 0.005, 0.05)
STEPS = 50
STEP_S = 0.005
ROUNDS = 3
RUNS = 32  # of the group commit
SECONDS = 3.0


@step
def strict(n: int) -> int:
    return n + 1


@step(durability="relaxed")
def relaxed(n: int) -> int:
    return n + 1


def chain(one: Any) -> Any:
    async def flow(count: int) -> int:
        n = 0
        for _ in range(count):
            n = await one(n)
        return n

    return flow


class Sleeper:
    """Executes each step call by sleeping `STEP_S`; everything happens on the thread that calls `run`."""

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[StepCall | None] = queue.SimpleQueue()
        self.codec: Any = None
        self.began: float | None = None
        self.slept_s = 0.0

    def dispatch_locked(self, call: StepCall) -> None:
        self.todo.put(call)

    def withdraw_locked(self, position: str, dispatch: int) -> None:
        pass

    def look_again(self) -> None:
        self.todo.put(None)

    def run(self, active: ActiveRun) -> None:
        while active.report is None:
            call = self.todo.get(timeout=60)
            if call is None:
                active.confirm_locked()
                continue
            began = time.perf_counter()
            self.began = self.began or began
            time.sleep(STEP_S)
            n = self.codec.decode(call.args[0])
            self.slept_s += time.perf_counter() - began
            outcome = Outcome(call.position, call.dispatch, "completed", 1, result=self.codec.encode(n + 1))
            outcome.started_at = outcome.ended_at = time.time()
            active.outcome_locked(outcome)


def created(storage: StoragePort, codec: StorageCodec) -> RunCreated:
    return RunCreated(
        seq=0,
        at=time.time(),
        run_id=f"bench-{new_id()}",
        run_uid=new_id(),
        storage_id=storage.storage_id,
        workflow="chain",
        code=CodeRef(how="import", name="chain"),
        environment=CodeEnvironment(key="bench", python="3.11"),
        args=[codec.encode(STEPS)],
    )


def one_chain(storage: StoragePort, one: Any) -> tuple[float, float]:
    """(seconds from the hand-out to the durable end, seconds that the steps took)."""
    codec = StorageCodec(storage)
    event = created(storage, codec)
    storage.create_runs([event])
    journal, events = storage.activate(event.run_id, "", first=True)
    sleeper = Sleeper()
    sleeper.codec = codec
    active = ActiveRun(Assignment(event.run_id, first=True), journal, events, sleeper, who=("bench", "bench"))
    began = time.perf_counter()
    active.begin_locked(chain(one), codec, "", Limits())
    sleeper.run(active)
    took = time.perf_counter() - began
    assert active.report is not None
    assert active.report.status == "completed", active.report
    return took, sleeper.slept_s


def appends(storage: StoragePort, runs: int) -> float:
    """Events a second, of so many runs that append one event after another without waiting, 64 ahead at most."""
    codec = StorageCodec(storage)
    made = [created(storage, codec) for _ in range(runs)]
    storage.create_runs(made)
    journals: list[JournalPort] = [storage.activate(event.run_id, "", first=True)[0] for event in made]
    ahead: dict[int, list[Any]] = {i: [] for i in range(runs)}
    seqs = [0] * runs
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for i, journal in enumerate(journals):
            if len(ahead[i]) >= 64:
                ahead[i].pop(0).result()
                count += 1
            seqs[i] += 1
            ahead[i].append(journal.append([TimerFired(seq=seqs[i], at=0.0, position="1")]))
    for futures in ahead.values():
        for future in futures:
            future.result()
            count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    figures: list[dict[str, Any]] = []
    print(f"load {os.getloadavg()[0]:.1f}; {STEPS} steps of {STEP_S * 1000:g} ms, best of {ROUNDS}")
    print(
        f"{'latency':>9} {'round trip':>10} {'strict':>9} {'relaxed':>9} {'aim':>9} {'events/s, 1':>16} {RUNS:>4} runs"
    )
    for latency_s in LATENCIES_S:
        with tiny_server(latency_s) as port:
            os.environ.update(environment(f"http://127.0.0.1:{port}"))
            storage = open_storage(f"s3://{BUCKET}/bench-{port}")
            trip_s = round_trip(storage)
            both = [(one_chain(storage, strict), one_chain(storage, relaxed)) for _ in range(ROUNDS)]
            strict_s = min(pair[0][0] for pair in both)
            relaxed_s, slept_s = min(pair[1] for pair in both)
            aim_s = 1.5 * latency_s + slept_s
            single, many = appends(storage, 1), appends(storage, RUNS)
        figures.append(
            {
                "latency_s": latency_s, "round_trip_s": trip_s, "strict_s": strict_s, "relaxed_s": relaxed_s,
                "steps_s": slept_s, "aim_s": aim_s, "events_per_s_1": single, f"events_per_s_{RUNS}": many,
            }
        )  # fmt: skip
        print(
            f"{latency_s * 1000:7.1f}ms {trip_s * 1000:8.2f}ms {strict_s * 1000:7.1f}ms {relaxed_s * 1000:7.1f}ms "
            f"{aim_s * 1000:7.1f}ms {single:16.0f} {many:9.0f}",
            flush=True,
        )
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def round_trip(storage: StoragePort) -> float:
    """Seconds that one small object takes to be read, the median of 21."""
    from pyworkflow_ray.storage.objects.loop import current_loop
    from pyworkflow_ray.storage.objects.storage import ObjectStorage

    assert isinstance(storage, ObjectStorage)

    async def timed() -> list[float]:
        times = []
        for _ in range(21):
            began = time.perf_counter()
            await storage.bucket.get("storage.json")
            times.append(time.perf_counter() - began)
            await asyncio.sleep(0)
        return sorted(times)

    return current_loop().run(timed())[10]


if __name__ == "__main__":
    main()
