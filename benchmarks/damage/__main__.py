"""`python -m benchmarks.damage`: damage a store in every way, and print what its engine answered.

Calls `harness`. `--engine dbos` does the same to DBOS on SQLite. With `--step 1` every bit and every length is tried,
which takes hours; the default takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.damage import damages
from benchmarks.damage.dbos_store import DbosStore
from benchmarks.damage.harness import OUTCOMES, Engine, Harness, Report
from benchmarks.damage.ours import Ours


def content(harness: Harness, step: int) -> Iterator[damages.Damage]:
    """What is done to the bytes of one file: every `step`-th bit, every `step`-th length, and every block."""
    state = harness.state
    for number, file in enumerate(state):
        yield from damages.flipped_bits(state, file, step, number % step)
        yield from damages.cuts(state, file, step, number % step)
        yield from damages.additions(state, file)
        room = file.partition("/")[0]
        others = [other for other in state if other != file and other.startswith(room)][:2]
        yield from damages.moved_blocks(state, file, others)


def places(harness: Harness, elsewhere: damages.State) -> Iterator[damages.Damage]:
    """What is done to whole files: gone, stale, exchanged, copied, brought from another store."""
    state = harness.state
    yield from damages.removed(state)
    yield from damages.stale_files(harness.history)
    yield from damages.misplaced_files(state)
    yield from damages.copies(state, harness.engine.names(state))
    yield from damages.foreign_files(state, elsewhere)


def damage_all(engine: Engine, step: int, thorough: int) -> Report:
    """Every damage of one engine's store, in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        elsewhere = engine.make(Path(directory, "elsewhere"))[-1]
        harness = Harness(engine, Path(directory, "store"), thorough=thorough)
        harness.run(content(harness, step))
        return harness.run(places(harness, elsewhere))


def table(report: Report) -> str:
    kinds = sorted({kind for kind, _, _ in report.counts})
    lines = ["| damage | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for kind in kinds:
        counts = [sum(n for (k, _, o), n in report.counts.items() if (k, o) == (kind, outcome)) for outcome in OUTCOMES]
        lines.append(f"| {kind} | " + " | ".join(str(count or "") for count in counts) + " |")
    totals = [str(report.total(outcome)) for outcome in OUTCOMES]
    return "\n".join([*lines, "| all | " + " | ".join(totals) + " |"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damage")
    parser.add_argument("--step", type=int, default=29, help="every so many bits and lengths (1: all)")
    parser.add_argument("--thorough", type=int, default=211, help="every so many damages all calls are asked")
    parser.add_argument("--engine", choices=["ours", "dbos"], default="ours", help="dbos needs the group `bench`")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.perf_counter()
    report = damage_all(Ours() if options.engine == "ours" else DbosStore(), options.step, options.thorough)
    if options.json:
        counts = [[*key, count] for key, count in sorted(report.counts.items())]
        print(json.dumps({"engine": report.engine, "counts": counts, "worst": report.worst}))
    else:
        print(f"{report.engine}: {len(report)} answers in {time.perf_counter() - began:.0f} s\n\n{table(report)}")
        for line in report.worst[:50]:
            print(f"- {line}")
    return 1 if report.total("SILENT") + report.total("crash") + report.total("hang") else 0


if __name__ == "__main__":
    raise SystemExit(main())
