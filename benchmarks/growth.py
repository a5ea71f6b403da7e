"""How cost grows, beside bare Ray where that does the same: `python -m benchmarks.growth [--json FILE]`.

Parts, to be chosen with `--parts`:

load      latency and runs/s with so many runs in flight, each of three task steps
runs      milliseconds a run of three local steps, by how many are started at once
steps     a step at the end of a run of `--steps` local steps against one at its beginning, by the log's own times
notice    a run actor is killed: from the SIGKILL to the run's next event, in turns with how long bare Ray takes to tell
          the caller of an actor of its own that it is dead
parked    memory of the controller a parked run
nodes     steps/s on 1, 2 and 4 nodes of one CPU each, for steps that wait (this machine's CPUs are shared by all nodes,
          so steps that compute could not show it)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.flows import asleep, many_local, three_local, three_tasks, waiting
from benchmarks.local_ray import start_ray
from benchmarks.runs import percentile, recoveries

IN_FLIGHT: Final = (1, 8, 64)
WINDOW: Final = 200  # steps that are averaged at either end of a long run
WAIT_S: Final = 0.05
NODES: Final = (1, 2, 4)


def load(runs: int, rounds: int) -> dict[str, Any]:
    """So many clients, each of which starts a run when its last one has ended. Round by round, each number in turn."""
    import pyworkflow_ray as pw

    def one(_: int) -> float:
        began = time.perf_counter()
        assert pw.run(three_tasks, 0) == 3
        return time.perf_counter() - began

    seconds: dict[int, list[float]] = {count: [] for count in IN_FLIGHT}
    rates: dict[int, list[float]] = {count: [] for count in IN_FLIGHT}
    for _ in range(rounds):
        for count in IN_FLIGHT:
            with ThreadPoolExecutor(count) as clients:
                began = time.perf_counter()
                seconds[count] += clients.map(one, range(runs))
                rates[count].append(runs / (time.perf_counter() - began))
    return {
        str(count): {
            "runs_per_s": statistics.median(rates[count]),
            "p50_s": percentile(seconds[count], 0.5),
            "p99_s": percentile(seconds[count], 0.99),
        }
        for count in IN_FLIGHT
    }


def by_runs(sizes: list[int]) -> dict[str, float]:
    """Seconds a run, of so many that are started at once."""
    import pyworkflow_ray as pw

    found = {}
    for size in sizes:
        began = time.perf_counter()
        for handle in pw.start_many(three_local, [(0,)] * size):
            assert handle.result(timeout=1800) == 3
        found[str(size)] = (time.perf_counter() - began) / size
    return found


def by_steps(steps: int, rounds: int) -> dict[str, float]:
    """Seconds a step near the beginning and the end of one run."""
    import pyworkflow_ray as pw

    first, last = [], []
    for _ in range(rounds):
        handle = pw.start(many_local, steps)
        assert handle.result(timeout=1800) == steps
        at = [event.at for event in handle.events() if event.type == "step_completed"]
        first.append((at[2 * WINDOW] - at[WINDOW]) / WINDOW)  # the first ones warm the process
        last.append((at[-1] - at[-1 - WINDOW]) / WINDOW)
    return {
        "steps": steps,
        "first_s": statistics.median(first),
        "last_s": statistics.median(last),
        "ratio": statistics.median(b / a for a, b in zip(first, last, strict=True)),
    }


def notice(kills: int) -> dict[str, float]:
    """Ours and Ray's notice, in turns."""
    import ray

    @ray.remote(num_cpus=0)
    class Bare:
        def pid(self) -> int:
            return os.getpid()

        def stay(self) -> None:
            time.sleep(3600)

    ours, theirs = [], []
    for _ in range(kills):
        actor = Bare.remote()
        pid = ray.get(actor.pid.remote())
        answer = actor.stay.remote()
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(answer)
        theirs.append(time.time() - killed)
        ours += recoveries(1)
    return {
        "kills": kills,
        "recovery_p50_s": percentile(ours, 0.5),
        "recovery_p99_s": percentile(ours, 0.99),
        "notice_p50_s": percentile(theirs, 0.5),
        "notice_p99_s": percentile(theirs, 0.99),
        "beyond_p50_s": statistics.median(a - b for a, b in zip(ours, theirs, strict=True)),
    }


def parked(runs: int) -> dict[str, float]:
    """Bytes of the controller a run that sleeps for an hour."""
    import psutil

    import pyworkflow_ray as pw

    controllers = [
        one for one in psutil.process_iter(["cmdline"]) if "ray::Controller" in " ".join(one.info["cmdline"] or ())
    ]
    controller = max(controllers, key=lambda one: one.create_time())
    before = controller.memory_info().rss
    handles = pw.start_many(asleep, [(3600.0,)] * runs)
    for handle in handles:
        while handle.status() != "parked":
            time.sleep(0.02)
    return {"runs": runs, "bytes_a_run": max(0, controller.memory_info().rss - before) / runs}


def by_nodes(rounds: int, steps: int = 200) -> dict[str, Any]:
    """Steps a second by nodes, and how much of n times one node that is. Each cluster is a new one."""
    rates: dict[int, list[float]] = {count: [] for count in NODES}
    for _ in range(rounds):
        for count in NODES:
            with cluster_of(count):
                rates[count].append(_wide(steps))
    one = statistics.median(rates[1])
    return {
        str(count): {"steps_per_s": statistics.median(values), "efficiency": statistics.median(values) / (count * one)}
        for count, values in rates.items()
    }


def _wide(steps: int) -> float:
    import pyworkflow_ray as pw

    for _ in range(3):  # each node has started its worker by then
        pw.run(waiting, 100, WAIT_S)
    began = time.perf_counter()
    pw.run(waiting, steps, WAIT_S)
    return steps / (time.perf_counter() - began)


@contextlib.contextmanager
def cluster_of(count: int) -> Iterator[None]:
    """A cluster of so many nodes of one CPU, with this process as its driver."""
    import ray
    from ray.cluster_utils import Cluster

    import pyworkflow_ray as pw

    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")  # short: a socket's path has 107 characters
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False, "temp_dir": temp})
    try:
        for _ in range(count - 1):
            cluster.add_node(**small)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        pw.init(storage=Path(temp) / "storage")
        yield
    finally:
        pw.shutdown()
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(temp, ignore_errors=True)


def measure(parts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON."""
    import ray

    import pyworkflow_ray as pw

    together: dict[str, Callable[[], Any]] = {
        "load": lambda: load(options.runs, options.rounds),
        "runs": lambda: by_runs([int(size) for size in options.sizes.split(",")]),
        "steps": lambda: by_steps(options.steps, options.rounds),
        "notice": lambda: notice(options.kills),
        "parked": lambda: parked(options.parked),
    }
    figures: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    }
    if "nodes" in parts:
        figures["nodes"] = by_nodes(max(1, options.rounds - 1))
    if together.keys() & set(parts):
        folder = tempfile.mkdtemp(prefix="pyworkflow-ray-bench-")
        start_ray()
        try:
            pw.init(storage=Path(folder) / "storage", pool_max=os.cpu_count())
            pw.run(three_tasks, 0), pw.run(three_local, 0)
            figures |= {name: part() for name, part in together.items() if name in parts}
        finally:
            pw.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    return figures


PARTS: Final = ("load", "runs", "steps", "notice", "parked", "nodes")


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=100, help="runs of each number of clients a round")
    parser.add_argument("--sizes", default="10,100,1000,10000", help="runs that are started at once")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parked", type=int, default=2_000, help="runs that are parked")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(set(parts) - set(PARTS)))}: choose of {', '.join(PARTS)}")
    figures = measure(parts, options)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
