"""Throughput, latency, start-up, recovery and fdatasyncs beside bare Ray: `python -m benchmarks.runs [--json FILE]`.

All rows are measured in one interleaved run: round by round, each row in turn, so that a noisy machine hits all of them
alike. The bare row does the same three tasks (num_cpus=1) in warm sync actors, nothing durable, one run in flight an
actor, as many actors as our pool has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.flows import ten_slow, three_local, three_tasks
from benchmarks.local_ray import start_ray

ACTORS = 2


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def bare_actors(count: int) -> tuple[Any, list[Any]]:
    """Warm sync actors, each of which runs three Ray tasks one after another."""
    import ray

    @ray.remote(num_cpus=1, max_retries=0)
    def no_op(n: int) -> int:
        return n + 1

    @ray.remote(num_cpus=0)
    class Bare:
        def run(self, n: int) -> int:
            for _ in range(3):
                n = ray.get(no_op.remote(n))
            return n

    actors = [Bare.remote() for _ in range(count)]
    ray.get([actor.run.remote(0) for actor in actors])
    return ray, actors


def bare_rate(ray: Any, actors: list[Any], runs: int) -> float:
    """Runs a second, one in flight an actor."""
    began = time.perf_counter()
    flying = {actor.run.remote(0): actor for actor in actors}
    left = runs - len(flying)
    while flying:
        done, _ = ray.wait(list(flying), num_returns=1)
        actor = flying.pop(done[0])
        ray.get(done[0])
        if left > 0:
            left -= 1
            flying[actor.run.remote(0)] = actor
    return runs / (time.perf_counter() - began)


def rate(flow: Any, runs: int) -> float:
    """Durable runs a second, many at once."""
    import pyworkflow_ray as pw

    began = time.perf_counter()
    for handle in pw.start_many(flow, [(0,)] * runs):
        assert handle.result(timeout=300) == 3
    return runs / (time.perf_counter() - began)


def latencies(flow: Any, runs: int) -> list[float]:
    """Seconds of each run, one at a time."""
    import pyworkflow_ray as pw

    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        assert pw.run(flow, 0) == 3
        seconds.append(time.perf_counter() - began)
    return seconds


def recoveries(kills: int) -> list[float]:
    """Seconds from the SIGKILL of a run actor to the next event its run reports."""
    import pyworkflow_ray as pw

    seconds = []
    for n in range(kills):
        handle = pw.start(ten_slow, 0.05)
        owner = _owner(handle, completed=1 + n % 4)
        before = handle.events()[-1].seq
        killed = time.time()
        os.kill(owner, signal.SIGKILL)
        while not any(e.seq > before and e.type == "run_activated" for e in handle.events()):
            time.sleep(0.002)
        seconds.append(time.time() - killed)
        assert handle.result(timeout=60) == 10
    return seconds


def _owner(handle: Any, completed: int) -> int:
    """The process id of the run's actor, once so many steps are completed."""
    while True:
        events = handle.events()
        activated = [e for e in events if e.type == "run_activated"]
        if activated and sum(e.type == "step_completed" for e in events) >= completed:
            return int("".join(c for c in activated[-1].worker.split("@")[0] if c.isdigit()))
        time.sleep(0.002)


def fdatasyncs_a_step(steps: int = 100) -> float:
    """Driver and journal of production in this process, a sequential run of no-op steps, calls counted at the seam."""
    from pyworkflow_ray.engine.calls import Outcome
    from pyworkflow_ray.engine.commands import Append, Dispatch, Finish
    from pyworkflow_ray.engine.driver import Driver
    from pyworkflow_ray.engine.events import CodeEnvironment, CodeRef, RunActivated, RunCreated
    from pyworkflow_ray.storage.codec import StorageCodec
    from pyworkflow_ray.storage.disk import Disk
    from pyworkflow_ray.storage.storage import Storage

    class Counting(Disk):
        calls = 0

        def fdatasync(self, fd: int) -> None:
            Counting.calls += 1
            super().fdatasync(fd)

    async def flow() -> int:
        for n in range(steps):
            await local_step_durably(n)
        return steps

    from benchmarks.flows import local_step as local_step_durably

    with tempfile.TemporaryDirectory() as folder:
        storage = Storage.open(folder, disk=Counting())
        codec = StorageCodec(storage)
        created = RunCreated(
            at=time.time(),
            run_id="counted",
            run_uid="0" * 32,
            storage_id=storage.storage_id,
            workflow="counted",
            code=CodeRef(how="import", name="counted"),
            environment=CodeEnvironment(key="none", python=platform.python_version()),
            seq=0,
        )
        storage.create_run(created, lease="lease")
        journal, events = storage.activate("counted", "lease", first=True)
        driver = Driver(flow, codec, rng=random.Random(0))
        before = Counting.calls
        driver.activate(events, RunActivated(epoch=journal.epoch), time.time())
        finished = False
        while not finished:
            for effect in driver.effects():
                now = time.time()
                if isinstance(effect, Append):
                    driver.durable(journal.append(list(effect.events)).result(), now)
                elif isinstance(effect, Dispatch):
                    call = effect.call
                    done = Outcome(call.position, call.dispatch, "completed", 1, started_at=now, ended_at=now)
                    done.result = codec.encode(0)
                    driver.outcome(done, now)
                elif isinstance(effect, Finish):
                    finished = True
        return (Counting.calls - before) / steps


def measure(rounds: int, runs: int, kills: int) -> dict[str, Any]:
    """All figures, as JSON."""
    import pyworkflow_ray as pw

    folder = tempfile.mkdtemp(prefix="pyworkflow-ray-bench-")
    import ray

    began = time.perf_counter()
    start_ray()
    ray_s = time.perf_counter() - began
    began = time.perf_counter()
    pw.init(storage=Path(folder) / "storage", pool_min=ACTORS, pool_max=ACTORS)
    start_up = time.perf_counter() - began
    began = time.perf_counter()
    pw.run(three_tasks, 0)
    first_run = time.perf_counter() - began
    module, actors = bare_actors(ACTORS)
    rate(three_tasks, 20), rate(three_local, 20), bare_rate(module, actors, 20)  # warm all of them
    rows: dict[str, list[float]] = {"bare": [], "tasks": [], "local": []}
    single: dict[str, list[float]] = {"tasks": [], "local": []}
    for _ in range(rounds):
        rows["bare"].append(bare_rate(module, actors, runs))
        rows["tasks"].append(rate(three_tasks, runs))
        rows["local"].append(rate(three_local, runs))
        single["tasks"] += latencies(three_tasks, 20)
        single["local"] += latencies(three_local, 20)
    recovered = recoveries(kills)
    figures = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
        "ray_init_s": ray_s,
        "start_up_beyond_ray_s": start_up,
        "first_run_s": first_run,
        "runs_per_s": {name: statistics.median(values) for name, values in rows.items()},
        "spread": {name: [min(values), max(values)] for name, values in rows.items()},
        "ratio_to_bare": {
            name: statistics.median(a / b for a, b in zip(rows[name], rows["bare"], strict=True))
            for name in ("tasks", "local")
        },
        "latency_s": {
            name: {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)} for name, values in single.items()
        },
        "recovery_s": {"kills": len(recovered), "p50": percentile(recovered, 0.5), "p99": percentile(recovered, 0.99)},
        "fdatasyncs_a_step": fdatasyncs_a_step(),
    }
    pw.shutdown()
    ray.shutdown()
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as rows of text, each beside its aim."""
    rates, ratios, recovery = figures["runs_per_s"], figures["ratio_to_bare"], figures["recovery_s"]
    rows = [
        ("bare Ray, 3 tasks a run", f"{rates['bare']:.0f} runs/s", ""),
        ("task steps", f"{rates['tasks']:.0f} runs/s, {ratios['tasks']:.2f} x bare", "aim 0.9 x"),
        ("local steps", f"{rates['local']:.0f} runs/s, {ratios['local']:.2f} x bare", "aim 3.5 x"),
        *(
            (f"one at a time, {name}", f"p50 {v['p50'] * 1000:.1f} ms, p99 {v['p99'] * 1000:.1f} ms", "")
            for name, v in figures["latency_s"].items()
        ),
        ("start-up beyond ray.init", f"{figures['start_up_beyond_ray_s']:.2f} s", "aim 2 s"),
        ("first run after it", f"{figures['first_run_s']:.2f} s", ""),
        (
            f"recovery after SIGKILL ({recovery['kills']})",
            f"p50 {recovery['p50']:.3f} s, p99 {recovery['p99']:.3f} s",
            "aim p99 1 s",
        ),
        ("fdatasyncs a step", f"{figures['fdatasyncs_a_step']:.2f}", "aim 1"),
    ]
    return "\n".join(f"{name:<34}{value:<40}{aim}" for name, value, aim in rows)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=100, help="runs of each row a round")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.rounds, options.runs, options.kills)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
