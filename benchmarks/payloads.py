"""A numpy array between two steps, against bare Ray passing the ref: `python -m benchmarks.payloads [--mib N ...]`.

Each round makes arrays that no round before had (an equal one would be named, not stored again), and measures, one
after another: two steps of a workflow; two Ray tasks, the second given the ref of the first (nothing durable); and the
disk alone, as many bytes written and synced. `whole` is from the start to the answer; `hand-over` from the end of the
first function to the beginning of the second: what is between them is ours, or Ray's. `encrypted` is the same workflow
through the AES-GCM codec.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import pyworkflow_ray as pw
from benchmarks.local_ray import start_ray
from pyworkflow_ray.crypto import AesGcm

MIB = 1024 * 1024
Ended = tuple[float, float]  # seconds: whole, hand-over


def codec() -> AesGcm:
    """Of the encrypted rows. Its key is in the source: no secret is measured."""
    return AesGcm({"bench": bytes(range(32))})


def array(mib: int, seed: int) -> np.ndarray[Any, Any]:
    return np.arange(mib * MIB // 8, dtype=np.int64) ^ np.int64(seed * 0x9E3779B97F4A7C15 % 2**63)


class Made:
    """The array, and when its maker was done with it (UNIX time)."""

    def __init__(self, value: Any, at: float) -> None:
        self.value = value
        self.at = at


def make(mib: int, seed: int) -> Made:
    value = array(mib, seed)
    return Made(value, time.time())


def look(made: Made) -> tuple[float, int]:
    """The hand-over's seconds, and a sum over a page each so that the memory is there."""
    taken = time.time() - made.at
    return taken, int(made.value[::512].sum())


make_step, look_step = pw.step(make), pw.step(look)


@pw.workflow
async def hand_over(mib: int, seed: int) -> tuple[float, int]:
    return await look_step(await make_step(mib, seed))


def durable(mib: int, seed: int) -> Ended:
    began = time.perf_counter()
    taken, total = pw.run(hand_over, mib, seed)
    whole = time.perf_counter() - began
    assert total == int(array(mib, seed)[::512].sum())
    return whole, taken


def bare(ray: Any, mib: int, seed: int) -> Ended:
    began = time.perf_counter()
    taken, _ = ray.get(ray.remote(look).remote(ray.remote(make).remote(mib, seed)))
    return time.perf_counter() - began, taken


def disk(directory: Path, mib: int, seed: int) -> Ended:
    """The bytes written and synced by nobody but this process."""
    data = memoryview(array(mib, seed)).cast("B")
    path = directory / "alone"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        at = 0
        while at < len(data):
            at += file.write(data[at : at + 8 * MIB])
        os.fdatasync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took, took


def measure(sizes: list[int], rounds: int, *, encrypted: bool) -> dict[str, Any]:
    """Seconds by size and row, of each round."""
    import ray

    start_ray()
    directory = Path(tempfile.mkdtemp(prefix="pyworkflow-ray-bench-"))
    try:
        pw.init(storage=directory / "storage", codec=codec if encrypted else None)
        durable(1, 0), bare(ray, 1, 0)
        found: dict[str, dict[str, list[Ended]]] = {}
        seed = 1
        for mib in sizes:
            rows: dict[str, list[Ended]] = {"durable": [], "bare": [], "disk": []}
            for _ in range(rounds):
                seed += 3
                rows["bare"].append(bare(ray, mib, seed))
                rows["durable"].append(durable(mib, seed + 1))
                rows["disk"].append(disk(directory, mib, seed + 2))
                for blob in (directory / "storage" / "blobs").rglob("*"):  # a round's gigabyte is not kept
                    if blob.is_file() and blob.stat().st_size >= mib * MIB // 2:
                        blob.unlink()
            found[str(mib)] = rows
        return {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}", "ray": ray.__version__, "rows": found}
    finally:
        pw.shutdown()
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def report(figures: dict[str, Any], name: str) -> None:
    print(f"{figures['machine']}, ray {figures['ray']}, load {os.getloadavg()[0]:.1f}, {name}")
    print(f"{'MiB':>6} {'':>9} {'whole':>9} {'× bare':>7} {'hand-over':>10} {'× bare':>7}")
    for mib, rows in figures["rows"].items():
        base = [statistics.median(one[part] for one in rows["bare"]) for part in (0, 1)]
        for row, rounds in rows.items():
            whole, taken = (statistics.median(one[part] for one in rounds) for part in (0, 1))
            print(f"{mib:>6} {row:>9} {whole:8.3f}s {whole / base[0]:7.2f} {taken:9.3f}s {taken / base[1]:7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 64, 1024], help="sizes of the array")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encrypted", action="store_true", help="through the AES-GCM codec, at most 1,000 MiB")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    given = parser.parse_args()
    figures = measure(given.mib, given.rounds, encrypted=given.encrypted)
    report(figures, "encrypted" if given.encrypted else "in clear")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
