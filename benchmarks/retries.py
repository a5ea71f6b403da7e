"""Durable retry attempts a second beside bare Ray, stamina and DBOS: `python -m benchmarks.retries [--json FILE]`.

Many runs at once, each of steps one after another that fail four times and then succeed: at once, after a short
jittered delay, and after a delay so long that the worker is given back; by task steps and by local steps. Also steps of
50 attempts. All rows are measured in one interleaved run, round by round. Afterwards each journal is read back: an
attempt that is not in it fails the benchmark.

The others at the same work: a Ray task that Ray itself retries (nothing durable, nothing recorded), stamina in this
process (the same), DBOS on SQLite and on PostgreSQL (the step's end is durable, its attempts are not recorded). The
last row is what one core encodes of the same attempt records as JSON with a checksum: the ceiling of any such log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.flaky import FEW, LONG_S, MANY, SHORT_S, by_local_steps, by_tasks
from benchmarks.local_ray import start_ray

ACTORS = 2
# Of each row: steps a run, attempts a step.
SHAPES = {"at_once": (20, FEW), "three": (3, FEW), "jittered": (3, FEW), "handed_back": (1, FEW), "many": (4, MANY)}


# Ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """Rates of our rows, and the runs that made them."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.runs: list[tuple[str, int, int]] = []  # run id, steps, attempts a step

    def rate(self, flow: Any, shape: str, runs: int) -> float:
        """Attempts a second of so many runs, from their start to the last result."""
        import pyworkflow_ray as pw

        steps, attempts = SHAPES[shape]
        kind = "at_once" if shape == "three" else shape
        began = time.perf_counter()
        handles = pw.start_many(flow, [(kind, steps, n * steps) for n in range(runs)])
        for handle in handles:
            assert handle.result(timeout=600) == steps * attempts
        seconds = time.perf_counter() - began
        self.runs += [(handle.run_id, steps, attempts) for handle in handles]
        return runs * steps * attempts / seconds

    def read_back(self) -> dict[str, Any]:
        """Every attempt that was made, found in the journals; an AssertionError names what is missing."""
        from pyworkflow_ray.storage.storage import Storage

        storage = Storage.open(self.storage, create=False)
        found, kept = 0, []
        for run_id, steps, attempts in self.runs:
            events = storage.read_run(run_id).events
            found += sum(attempts_of_a_run(run_id, events, steps, attempts))
            if len(kept) < 20_000:
                kept += [event for event in events if event.type == "attempt_failed"]
                kept += [one for event in events if event.type == "attempts_failed" for one in event.each()]
        journal = sum(path.stat().st_size for path in self.storage.rglob("*.journal"))
        return {"runs": len(self.runs), "attempts": found, "bytes_an_attempt": journal / max(1, found), "events": kept}


def attempts_of_a_run(run_id: str, events: list[Any], steps: int, attempts: int) -> Iterator[int]:
    """How many attempts of each step the log has."""
    failed: dict[str, list[int]] = {}
    completed = {event.position: event.attempt for event in events if event.type == "step_completed"}
    for event in events:
        if event.type == "attempt_failed":
            failed.setdefault(event.position, []).append(event.attempt)
        elif event.type == "attempts_failed":
            failed.setdefault(event.position, []).extend(range(event.first, event.last + 1))
    assert len(completed) == steps, f"{run_id}: {len(completed)} of {steps} steps are completed in the log"
    for position, last in completed.items():
        numbers = [*failed.get(position, []), last]
        assert numbers == list(range(1, attempts + 1)), f"{run_id} step {position}: the log has attempts {numbers}"
        yield len(numbers)


def ceiling(events: list[Any]) -> float:
    """Attempt records a second that one core encodes as JSON and checks by CRC."""
    from pydantic_core import to_json

    chain = 0
    began = time.perf_counter()
    for event in events:
        chain = zlib.crc32(to_json(event), chain)
    return len(events) / (time.perf_counter() - began)


# The others -------------------------------------------------------------------------------------------------------


def bare_ray(ray: Any) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Tasks a second that do nothing; attempts a second of tasks that Ray retries. All submitted at once."""

    @ray.remote(num_cpus=1, max_retries=0)
    def no_op(order: int) -> int:
        return order

    @ray.remote(num_cpus=1, max_retries=FEW - 1, retry_exceptions=[ConnectionError])
    def flaky(order: int) -> int:
        from ray._private.worker import global_worker

        attempt = 1 + global_worker.core_worker.get_current_task_attempt_number()
        if attempt < FEW:
            raise ConnectionError(f"503 from payments, order {order}")
        return attempt

    def tasks(count: int) -> float:
        began = time.perf_counter()
        ray.get([no_op.remote(n) for n in range(count)])
        return count / (time.perf_counter() - began)

    def attempts(count: int) -> float:
        began = time.perf_counter()
        made = sum(ray.get([flaky.remote(n) for n in range(count)]))
        assert made == count * FEW
        return made / (time.perf_counter() - began)

    return tasks, attempts


def stamina_rate(calls: int) -> float:
    """Attempts a second of stamina in this process."""
    import stamina
    import stamina.instrumentation

    stamina.instrumentation.set_on_retry_hooks([])  # it would log each retry
    made = 0

    @stamina.retry(on=ConnectionError, attempts=FEW, timeout=None, wait_initial=0, wait_jitter=0, wait_max=0)
    def flaky(order: int) -> None:
        nonlocal made
        made += 1
        if made % FEW:
            raise ConnectionError(f"503 from payments, order {order}")

    began = time.perf_counter()
    for n in range(calls):
        flaky(n)
    assert made == calls * FEW
    return made / (time.perf_counter() - began)


class Dbos:
    """DBOS in a process of its own, on one database."""

    def __init__(self, database: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.dbos_peer", database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def _expect(self, said: str | None = None) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or said not in (None, line):
            raise RuntimeError(f"DBOS said {line!r}")
        return line

    def rate(self, runs: int, steps: int) -> float:
        """Attempts a second."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{runs} {steps}\n")
        self._process.stdin.flush()
        return runs * steps * FEW / float(self._expect())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """Debian's PostgreSQL with its default settings, fsync included, as an unprivileged user; None: it is not here."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        yield None
        return
    user = "postgres" if os.geteuid() == 0 else None
    data = folder / "postgres"
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet: dict[str, Any] = {"user": user, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": data}
    initdb = str(found[-1].with_name("initdb"))
    subprocess.run([initdb, "-D", str(data), "-A", "trust", "-U", "postgres"], check=True, **quiet)
    server = subprocess.Popen([str(found[-1]), "-D", str(data), "-k", str(data), "-p", str(port)], **quiet)
    try:
        ready = [str(found[-1].with_name("pg_isready")), "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode != 0:
            assert server.poll() is None, "PostgreSQL did not start"
            time.sleep(0.05)
        yield f"postgresql://postgres@127.0.0.1:{port}/dbos"
    finally:
        server.terminate()
        server.wait(timeout=30)


# All of them ------------------------------------------------------------------------------------------------------


def measure(rounds: int, scale: float, peers: bool) -> dict[str, Any]:
    """All figures, as JSON. scale: of the amount of work of each row."""
    import ray

    import pyworkflow_ray as pw

    logging.getLogger("pyworkflow_ray").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="pyworkflow-ray-bench-"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        others: dict[str, Dbos] = {}
        if peers:
            others["dbos_sqlite"] = Dbos(f"sqlite:///{folder}/dbos.sqlite")
            database = stack.enter_context(postgres(folder))
            if database is not None:
                others["dbos_postgres"] = Dbos(database)
            for other in others.values():
                stack.callback(other.close)
        # On a busy machine Ray's workers would stand back behind everything else, the rows without Ray included.
        os.environ.setdefault("RAY_worker_niceness", "0")
        start_ray()
        stack.callback(ray.shutdown)
        pw.init(storage=folder / "storage", pool_min=ACTORS, pool_max=ACTORS, log_level="ERROR")
        stack.callback(pw.shutdown)
        figures = _rounds(ray, Ours(folder / "storage"), others, rounds, scale)
    figures["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def _rounds(ray: Any, ours: Ours, others: dict[str, Dbos], rounds: int, scale: float) -> dict[str, Any]:
    def of(count: int) -> int:
        return max(2, round(count * scale))

    tasks, attempts = bare_ray(ray)
    rows: dict[str, Callable[[], float]] = {
        "bare_tasks": lambda: tasks(of(1000)),
        "bare_retries": lambda: attempts(of(60)),
        "stamina": lambda: stamina_rate(of(2000)),
    }
    for name, other in others.items():
        rows[name] = lambda other=other: other.rate(of(40), SHAPES["three"][0])  # type: ignore[misc]
        rows[f"{name}_20"] = lambda other=other: other.rate(of(6), SHAPES["at_once"][0])  # type: ignore[misc]
    for flow, name in ((by_tasks, "tasks"), (by_local_steps, "local")):
        for shape, runs in (("at_once", 60), ("three", 200), ("jittered", 40), ("handed_back", 200), ("many", 40)):
            rows[f"{name}_{shape}"] = lambda flow=flow, shape=shape, runs=runs: ours.rate(flow, shape, of(runs))  # type: ignore[misc]
    for name, row in rows.items():  # warm all of them
        if "handed_back" not in name:
            row()
    ours.runs.clear()
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            measured[name].append(row())
    back = ours.read_back()
    events = back.pop("events")
    measured["json_crc"] = [ceiling(events) for _ in range(max(3, rounds))][:rounds]
    return {
        "shapes": {name: {"steps": steps, "attempts": count} for name, (steps, count) in SHAPES.items()},
        "per_s": {name: statistics.median(values) for name, values in measured.items()},
        "spread": {name: [min(values), max(values)] for name, values in measured.items()},
        "ratios": ratios(measured),
        "in_the_log": back,
    }


def ratios(measured: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the ratios that the aims are about, each taken within its round."""

    def of(ours: str, theirs: str, factor: float = 1.0) -> float:
        pairs = zip(measured[ours], measured[theirs], strict=True)
        return statistics.median(one / (factor * other) for one, other in pairs)

    found = {
        "tasks_to_5_bare_tasks": of("tasks_at_once", "bare_tasks", FEW),
        "tasks_to_bare_retries": of("tasks_at_once", "bare_retries"),
        "many_tasks_to_json_crc": of("tasks_many", "json_crc"),
        "many_local_to_json_crc": of("local_many", "json_crc"),
    }
    for peer in ("dbos_sqlite", "dbos_postgres"):
        if peer in measured:
            for name in ("tasks", "local"):
                found[f"{name}_to_{peer}"] = of(f"{name}_at_once", f"{peer}_20")
                found[f"{name}_to_{peer}_three"] = of(f"{name}_three", peer)
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as rows of text, each beside its aim."""
    rates, spread, found = figures["per_s"], figures["spread"], figures["ratios"]
    long_s = (FEW - 1) * LONG_S
    labels = {
        "bare_tasks": "bare Ray, tasks that do nothing",
        "bare_retries": "bare Ray, its own retries",
        "stamina": "stamina, in process",
        "dbos_sqlite": "DBOS, SQLite, 3 steps a run",
        "dbos_sqlite_20": "DBOS, SQLite, 20 steps a run",
        "dbos_postgres": "DBOS, PostgreSQL, 3 steps a run",
        "dbos_postgres_20": "DBOS, PostgreSQL, 20 steps a run",
    }
    for name, text in (("tasks", "task steps"), ("local", "local steps")):
        labels |= {
            f"{name}_at_once": f"{text}, no delay",
            f"{name}_three": f"{text}, no delay, 3 a run",
            f"{name}_jittered": f"{text}, 0 to {SHORT_S * 1000:g} ms",
            f"{name}_handed_back": f"{text}, {LONG_S:g} s ({long_s:g} s a step)",
            f"{name}_many": f"{text} of {MANY} attempts",
        }
    labels["json_crc"] = "JSON + CRC of the records, one core"
    aims = {"local_at_once": "aim 10,000", "tasks_many": "aim 20,000", "local_many": "aim 20,000"}
    lines = [
        f"{label:<38}{rates[name]:>9,.0f}/s  ({spread[name][0]:,.0f} to {spread[name][1]:,.0f})".ljust(78)
        + aims.get(name, "")
        for name, label in labels.items()
        if name in rates
    ]
    wanted = {
        "tasks_to_5_bare_tasks": ("task steps / 5 x bare tasks", 0.9),
        "tasks_to_bare_retries": ("task steps / Ray's own retries", None),
        "many_tasks_to_json_crc": ("50 attempts, tasks / JSON + CRC", 0.1),
        "many_local_to_json_crc": ("50 attempts, local / JSON + CRC", 0.1),
    }
    for peer, text in (("dbos_sqlite", "DBOS SQLite"), ("dbos_postgres", "DBOS PostgreSQL")):
        for name, aim in (("tasks", 10), ("local", 25)):
            wanted[f"{name}_to_{peer}"] = (f"{name} / {text}, 20 steps", aim)
            wanted[f"{name}_to_{peer}_three"] = (f"{name} / {text}, 3 steps", aim)
    for name, (label, aim) in wanted.items():
        if name in found:
            lines.append(f"{label:<38}{found[name]:>9.2f} x".ljust(78) + (f"aim {aim:g} x" if aim else ""))
    log = figures["in_the_log"]
    lines.append(
        f"read back: {log['attempts']:,} attempts of {log['runs']:,} runs, all in the log, "
        f"{log['bytes_an_attempt']:,.0f} bytes each"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of the amount of work of each row")
    parser.add_argument("--no-peers", action="store_true", help="without DBOS")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.rounds, options.scale, not options.no_peers)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
