"""What the storage does in a second, and how it grows: `python -m benchmarks.storage`.

Parts, to be chosen with `--parts` (default: all but `objects`):

append      events/s of one run by events a commit, in turns with the fdatasync/s of one file on the same disk
concurrent  events/s of 1,000 runs that all commit, against the same; a sequential step commits three events
growth      for each of `--runs` (finished runs of ten events each, compacted): SQL against `read_parquet` of the same
            files in turns, pages of listings, and the start of a recovery over `--unfinished` more
compact     compaction of journals: runs and events a second; reading them again, as replay does
upkeep      a run's time from start to end, with and without a compaction in a process of its own, in turns
objects     events/s of 1,000 runs that all commit into a bucket (a small S3 server that adds each `--latency`), against
            objects a second that are created there one after another

Figures of one machine mean little: look at the ratios, which are taken in turns. `--json FILE` keeps all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.storage_data import BEGIN, WORKFLOWS, add_finished, add_unfinished, created
from pyworkflow_ray.engine.events import Event, TimerFired
from pyworkflow_ray.storage.catalogue import Query, canonical
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.journal import Journal
from pyworkflow_ray.storage.listing import page
from pyworkflow_ray.storage.storage import Storage

GROUPS: Final = (1, 3, 10, 100, 1_000)
AT_ONCE: Final = 1_000
EVENTS_A_STEP: Final = 3
THREADS: Final = 64
PARTS: Final = ("append", "concurrent", "growth", "compact", "upkeep")
QUESTIONS: Final = {
    "count": "select status, count(*) from runs group by 1",
    "failures": "select step, error_type, count(*) from attempts where status = 'failed' group by all",
    "events by type": "select type, count(*) from events group by 1",
    "one run": "select * from events where run_id = 'b00000-0017' order by seq",
}


def best_of(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds; the median."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def syncs(directory: str, seconds: float = 0.5) -> float:
    """fdatasync/s of one file that grows by 256 bytes each time."""
    path = os.path.join(directory, "syncs")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            os.write(fd, b"x" * 256)
            os.fdatasync(fd)
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        os.close(fd)
        os.unlink(path)


def fired(first: int, number: int) -> list[Event]:
    return [TimerFired(seq=seq, at=1.0, position=f"{seq}") for seq in range(first, first + number)]


def begun(storage: Storage, prefix: str, runs: int) -> list[Journal]:
    ids = [f"{prefix}-{n}" for n in range(runs)]
    storage.create_runs([created(storage, run_id, n, 1.0) for n, run_id in enumerate(ids)])
    return [storage.activate(run_id, "", first=True)[0] for run_id in ids]


def appending(storage: Storage, rounds: int = 5) -> dict[str, Any]:
    (journal,) = begun(storage, "append", 1)
    seq = 1
    found: dict[int, list[tuple[float, float]]] = {group: [] for group in GROUPS}
    for _ in range(rounds):
        for group in GROUPS:
            disk, began, count = syncs(storage.root, 0.2), time.perf_counter(), 0
            while time.perf_counter() - began < 0.3:
                journal.append(fired(seq, group)).result()
                seq, count = seq + group, count + group
            found[group].append((count / (time.perf_counter() - began), disk))
    journal.close()
    return {str(group): ratio(pairs) for group, pairs in found.items()}


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians of events/s and fdatasync/s, and the median of their quotients."""
    ours, disk = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"events_per_s": ours, "syncs_per_s": disk, "ratio": statistics.median(a / b for a, b in pairs)}


def concurrent(storage: Storage, rounds: int = 5, commits: int = 3) -> dict[str, float]:
    journals, pairs, seq = begun(storage, "many", AT_ONCE), [], 1

    def commit(journal: Journal, first: int) -> None:
        for number in range(commits):
            journal.append(fired(first + number * EVENTS_A_STEP, EVENTS_A_STEP)).result()

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(rounds):
            disk, began = syncs(storage.root), time.perf_counter()
            list(pool.map(commit, journals, [seq] * len(journals)))
            pairs.append((AT_ONCE * commits * EVENTS_A_STEP / (time.perf_counter() - began), disk))
            seq += commits * EVENTS_A_STEP
    for journal in journals:
        journal.close()
    return ratio(pairs)


def growing(storage: Storage, runs: int, unfinished: int) -> dict[str, Any]:
    """One size. Where the storage holds it already it is not made again."""
    found: dict[str, Any] = {"runs": runs, "unfinished": unfinished}
    if not storage.checkpoints.manifest().batches:
        began = time.perf_counter()
        add_finished(storage, runs)
        found["make_s"] = time.perf_counter() - began
        add_unfinished(storage, unfinished)
    began = time.perf_counter()
    page(storage, Query(), 20)
    found["first_listing_s"] = time.perf_counter() - began  # makes the catalogue, reads what has not ended
    found["listing_s"] = {name: best_of(partial(page, storage, query, 50)) for name, query in queries(runs)}
    found["recovery_s"] = best_of(storage.unfinished, 3)
    found["sql"] = asking(storage)
    return found


def queries(runs: int) -> Iterator[tuple[str, Query]]:
    middle = round((BEGIN.timestamp() + runs / 2) * 1_000_000)
    completed = frozenset({"completed"})
    yield "newest", Query()
    yield "status", Query(completed)
    yield "status, rare", Query(frozenset({"cancelled"}), WORKFLOWS[0])
    yield "attribute", Query(attributes=(("customer", frozenset({canonical("c77")})),))
    yield (
        "two attributes",
        Query(completed, attributes=(("shop", frozenset({canonical(3)})), ("rare", frozenset({canonical(True)})))),
    )
    yield "page in the middle", Query(completed, before=(middle, "x"))
    yield (
        "attributes that never meet",
        Query(attributes=(("shop", frozenset({canonical(4)})), ("rare", frozenset({canonical(True)})))),
    )


def asking(storage: Storage) -> dict[str, Any]:
    """Each question to us and to `read_parquet` of the same files, in turns. Ours also reads the unfinished runs."""
    import duckdb

    from pyworkflow_ray.storage.sql import rows
    from pyworkflow_ray.storage.stocktaking import checkpoints

    compacted = checkpoints(storage)
    assert compacted is not None
    began = time.perf_counter()
    rows(storage, "select count(*) from events")
    found: dict[str, Any] = {"first_s": time.perf_counter() - began}
    for name, sql in QUESTIONS.items():
        table = next(one for one in ("runs", "events", "attempts") if f"from {one}" in sql)
        paths = [compacted.path(file) for file in compacted.files if file.table == table]

        def raw(sql: str = sql, table: str = table, paths: list[str] = paths) -> None:
            connection = duckdb.connect()
            connection.execute(f"create view {table} as select * from read_parquet({paths!r})")
            connection.sql(sql).fetchall()

        pairs = [(best_of(partial(rows, storage, sql), 1), best_of(raw, 1)) for _ in range(5)]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        found[name] = {"s": ours, "raw_s": theirs, "ratio": statistics.median(a / b for a, b in pairs)}
    return found


def compacting(storage: Storage, runs: int = 2_000) -> dict[str, float]:
    for first in range(0, runs, 500):
        for journal in begun(storage, f"c{first}", 500):
            journal.append([*fired(1, 8), ended(9)]).result()
            journal.finish()
    ids = storage.run_directories()
    read_s = best_of(lambda: [storage.read_run(run_id) for run_id in ids[:500]], 3)
    began = time.perf_counter()
    done = compact(storage)
    took = time.perf_counter() - began
    return {"runs_per_s": done.runs / took, "events_per_s": done.events / took, "replayed_runs_per_s": 500 / read_s}


def ended(seq: int) -> Event:
    from pyworkflow_ray.engine.events import Payload, RunCompleted

    return RunCompleted(seq=seq, at=2.0, result=Payload(enc="json", data=1))


_UPKEEP: Final = (
    "import os, sys; os.nice(19)\n"
    "from pyworkflow_ray.storage.compact import compact\n"
    "from pyworkflow_ray.storage.storage import Storage\n"
    "compact(Storage.open(sys.argv[1], create=False))"
)


def beside_upkeep(storage: Storage, rounds: int = 6, runs: int = 60) -> dict[str, float]:
    """A run of ten commits with and without a compaction of 1,500 others at the same time, in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    overlapped = 0
    for number in range(rounds):
        for compaction in (False, True) if number % 2 else (True, False):
            process = None
            if compaction:
                for journal in begun(storage, f"old{number}", 1_500):
                    journal.append([*fired(1, 8), ended(9)]).result()
                    journal.finish()
                process = subprocess.Popen([sys.executable, "-c", _UPKEEP, storage.root])
            for one in range(runs):
                began = time.perf_counter()
                (journal,) = begun(storage, f"new{number}{compaction}{one}", 1)
                for seq in range(1, 10):
                    journal.append(fired(seq, 1)).result()
                journal.append([ended(10)]).result()
                journal.finish()
                times[compaction].append(time.perf_counter() - began)
                overlapped += process is not None and process.poll() is None
            if process is not None and process.wait():
                raise RuntimeError("the compaction failed")
    without, with_it = (statistics.median(times[which]) for which in (False, True))
    return {"alone_ms": without * 1e3, "beside_ms": with_it * 1e3, "added": with_it / without - 1, "met": overlapped}


def in_a_bucket(latencies_s: Sequence[float], rounds: int = 3, commits: int = 3) -> list[dict[str, float]]:
    """`concurrent` on slots, against one object created after another, in turns; for each latency of the server."""
    from benchmarks.object_server import BUCKET, environment, tiny_server
    from benchmarks.storage_objects import created as run_created
    from pyworkflow_ray.storage.codec import StorageCodec
    from pyworkflow_ray.storage.port import open_storage

    figures = []
    for latency_s in latencies_s:
        with tiny_server(latency_s) as port:
            os.environ.update(environment(f"http://127.0.0.1:{port}"))
            storage, pairs, seq = open_storage(f"s3://{BUCKET}/bench-{port}"), [], 1
            made = [run_created(storage, StorageCodec(storage)) for _ in range(AT_ONCE)]
            storage.create_runs(made)
            journals = [storage.activate(event.run_id, "", first=True)[0] for event in made]
            for _ in range(rounds):
                alone, began = creations(storage), time.perf_counter()
                for _ in range(commits):  # each run goes on when its own commit is durable; 1,000 are in flight
                    for future in [journal.append(fired(seq, EVENTS_A_STEP)) for journal in journals]:
                        future.result()
                    seq += EVENTS_A_STEP
                pairs.append((AT_ONCE * commits * EVENTS_A_STEP / (time.perf_counter() - began), alone))
        found = ratio(pairs)
        figures.append({"latency_ms": latency_s * 1e3, "creations_per_s": found.pop("syncs_per_s"), **found})
    return figures


def creations(storage: Any, seconds: float = 1.0) -> float:
    """Objects a second that are created one after another: what a commit costs alone."""
    from pyworkflow_ray.storage.objects.loop import current_loop

    async def create() -> int:
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            await storage.bucket.create(f"probe/{storage.bucket.token()}", b"x" * 300)
            count += 1
        return count

    return current_loop().run(create()) / seconds


@contextmanager
def storage_in(given: str | None, name: str) -> Iterator[Storage]:
    if given is not None:
        yield Storage.open(Path(given) / name)
        return
    with tempfile.TemporaryDirectory(prefix="storage-") as directory:
        yield Storage.open(Path(directory) / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, objects")
    parser.add_argument("--runs", default="10,1000,10000", help="sizes of `growth`; 1000000 takes some minutes")
    parser.add_argument("--unfinished", type=int, default=100, help="unfinished runs beside each size")
    parser.add_argument("--latency", default="0.0002,0.005,0.05", help="of the bucket, in seconds")
    parser.add_argument("--dir", help="keep the storages here, and use those that are here")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {}
    for name, part in (
        ("append", appending), ("concurrent", concurrent), ("compact", compacting), ("upkeep", beside_upkeep),
    ):  # fmt: skip
        parts[name] = partial(in_storage, given.dir, name, part)
    parts["growth"] = lambda: [
        in_storage(given.dir, f"runs-{runs}", partial(growing, runs=runs, unfinished=given.unfinished))
        for runs in map(int, given.runs.split(","))
    ]
    parts["objects"] = lambda: in_a_bucket([float(one) for one in given.latency.split(",")])
    wanted = given.parts.split(",")
    if not set(wanted) <= parts.keys():
        parser.error(f"--parts: {', '.join(sorted(set(wanted) - parts.keys()))}: choose of {', '.join(parts)}")
    machine = {"load": os.getloadavg()[0], "cpus": os.cpu_count(), "python": platform.python_version()}
    figures: dict[str, Any] = {"machine": machine}
    print(json.dumps(machine))
    for name in wanted:
        figures[name] = parts[name]()
        print(f"{name}: {json.dumps(rounded(figures[name]), indent=1)}", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def in_storage(given: str | None, name: str, part: Callable[[Storage], Any]) -> Any:
    with storage_in(given, name) as storage:
        return part(storage)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
