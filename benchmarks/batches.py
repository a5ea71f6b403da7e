"""Items a second and journal bytes a chunk of `step.map`: `python -m benchmarks.batches [--json FILE]`.

All rows are measured in one interleaved run, round by round: a map of no-op items on task workers and in the run actor,
a `gather` of single step calls, and bare Ray tasks, one an item (nothing durable). Growth is measured at four lengths
of the same map: bytes a chunk must not depend on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.flows import gather_singles, map_local, map_tasks
from benchmarks.local_ray import start_ray

GROWTH = (10, 20, 40, 80)  # chunks
CHUNK = 1_000


def rate(flow: Any, items: int, *more: int) -> float:
    """Items a second of one run, from its start to its result."""
    import pyworkflow_ray as pw

    began = time.perf_counter()
    assert pw.run(flow, items, *more) == items
    return items / (time.perf_counter() - began)


def bare_rate(ray: Any, items: int) -> float:
    """Items a second, a Ray task each, all submitted at once."""

    @ray.remote(num_cpus=1, max_retries=0)
    def no_op(n: int) -> int:
        return n

    began = time.perf_counter()
    ray.get([no_op.remote(n) for n in range(items)])
    return items / (time.perf_counter() - began)


def growth(chunks: int) -> dict[str, float]:
    """Events and bytes of the journal of a map of so many chunks."""
    import pyworkflow_ray as pw

    handle = pw.start(map_tasks, chunks * CHUNK, CHUNK)
    assert handle.result(300) == chunks * CHUNK
    events = [event for event in handle.events() if event.type == "chunk_completed"]
    journal = sum(path.stat().st_size for path in _journals(handle.run_id))
    return {"chunks": chunks, "events": len(events), "bytes": journal, "bytes_a_chunk": journal / chunks}


def _journals(run_id: str) -> list[Path]:
    import pyworkflow_ray as pw

    root = Path(pw.get_run(run_id)._storage.root)
    return [path for path in root.rglob("*.journal") if run_id in path.parts]


def measure(rounds: int, items: int) -> dict[str, Any]:
    """All figures, as JSON."""
    import ray

    import pyworkflow_ray as pw

    start_ray()
    pw.init(storage=Path(tempfile.mkdtemp(prefix="pyworkflow-ray-bench-")) / "storage")
    cpus = os.cpu_count() or 1
    rows: dict[str, list[float]] = {"bare": [], "singles": [], "map": [], "map_local": []}
    rate(map_tasks, 10_000, CHUNK), rate(map_local, 10_000, CHUNK), rate(gather_singles, 100), bare_rate(ray, 100)
    for _ in range(rounds):
        rows["bare"].append(bare_rate(ray, 2_000))
        rows["singles"].append(rate(gather_singles, 500))
        rows["map"].append(rate(map_tasks, items, CHUNK))
        rows["map_local"].append(rate(map_local, items, CHUNK))
    grown = [growth(chunks) for chunks in GROWTH]
    figures = {
        "machine": {"cpus": cpus, "python": platform.python_version(), "ray": ray.__version__},
        "items": items,
        "chunk": CHUNK,
        "items_per_s": {name: statistics.median(values) for name, values in rows.items()},
        "spread": {name: [min(values), max(values)] for name, values in rows.items()},
        "growth": grown,
    }
    pw.shutdown()
    ray.shutdown()
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as rows of text, each beside its aim."""
    rates, spread = figures["items_per_s"], figures["spread"]
    names = {
        "map": f"map of {figures['items']:,}, task workers",
        "map_local": f"map of {figures['items']:,}, local",
        "singles": "gather of single steps",
        "bare": "bare Ray, a task an item",
    }
    aims = {"map": "aim 10,000"}
    rows = [
        (label, f"{rates[name]:,.0f} items/s ({spread[name][0]:,.0f} to {spread[name][1]:,.0f})", aims.get(name, ""))
        for name, label in names.items()
    ]
    rows += [
        (
            f"journal, {g['chunks']} chunks",
            f"{g['events']} events, {g['bytes_a_chunk']:,.0f} bytes a chunk",
            "aim linear",
        )
        for g in figures["growth"]
    ]
    return "\n".join(f"{name:<34}{value:<44}{aim}" for name, value, aim in rows)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=100_000, help="items of each map")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.rounds, options.items)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
