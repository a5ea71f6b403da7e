"""All benchmarks, one after another, as one table with plots: `python -m benchmarks [--quick] [--out DIR]`.

Each runs in a process of its own and writes its JSON to the directory; `table.md` is the table, `table.json` the same
for machines, `growth.png` what grows. The whole takes about an hour on two cores; `--quick` a few minutes, with so
little work that its figures only show that everything works. `--from DIR` makes the table of an earlier run anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.table import ROWS, markdown, number, rows_of

QUICK: Final = {
    "runs": "--rounds 1 --runs 20 --kills 2",
    "growth": "--rounds 1 --runs 8 --sizes 10,100 --steps 1000 --kills 2 --parked 50",
    "retries": "--rounds 1 --scale 0.1 --no-peers",
    "breakers": "--rounds 5 --calls 200 --processes 4 --trips 3",
    "batches": "--rounds 1 --items 5000",
    "storage": "--runs 10,100 --parts concurrent,growth,compact",
    "resume": "--events 3000 --rounds 1",
    "telemetry": "",
}  # fmt: skip
WHOLE: Final = {"storage": "--parts append,concurrent,growth,compact,upkeep,objects --runs 1000,100000"}


def measure(parts: list[str], out: Path, *, quick: bool) -> list[str]:
    """Run each benchmark; its figures go to `out`. Returns those that failed, after the others were measured."""
    failed = []
    for part in parts:
        (out / f"{part}.json").unlink(missing_ok=True)  # or the figures of an earlier run stand in for one that fails
        arguments = (QUICK if quick else WHOLE).get(part, "").split()
        began = time.monotonic()
        print(f"{part}: load {os.getloadavg()[0]:.1f}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part}", *arguments, "--json", str(out / f"{part}.json")]
        with open(out / f"{part}.log", "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append(part)
    return failed


def collected(out: Path) -> dict[str, Any]:
    """The figures of every part that has been measured there."""
    files = {part: out / f"{part}.json" for part in ROWS}
    return {part: json.loads(file.read_text(encoding="utf-8")) for part, file in files.items() if file.exists()}


def plot(figures: dict[str, Any], file: Path) -> None:
    """How cost grows: latency by load, cost a run by runs, efficiency by nodes."""
    from matplotlib import pyplot

    growth = figures["growth"]
    drawn = [part for part in ("load", "runs", "nodes") if growth.get(part)]
    if not drawn:
        return
    figure, panels = pyplot.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.2), squeeze=False)
    for panel, part in zip(panels[0], drawn, strict=True):
        sizes = [int(size) for size in growth[part]]
        values = list(growth[part].values())
        if part == "load":
            panel.plot(sizes, [1e3 * v["p50_s"] for v in values], marker="o", label="p50")
            panel.plot(sizes, [1e3 * v["p99_s"] for v in values], marker="o", label="p99")
            panel.set(xlabel="runs in flight", ylabel="ms a run", title="latency under load")
            panel.legend(frameon=False)
        elif part == "runs":
            panel.plot(sizes, [1e3 * v for v in values], marker="o")
            panel.set(xlabel="runs started at once", ylabel="ms a run", title="cost of a run")
        else:
            panel.plot(sizes, [v["efficiency"] for v in values], marker="o")
            panel.set(xlabel="nodes", ylabel="of as many times one node", title="steps that wait", ylim=(0, 1.1))
        panel.set_xscale("log")
        panel.set_xticks(sizes, [number(size) for size in sizes], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.25, lw=0.5)
        panel.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> int:
    """Exit 1 when a benchmark failed: its log is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: shows that everything works")
    parser.add_argument("--only", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="default: %(default)s")
    parser.add_argument("--from", dest="given", type=Path, help="measure nothing: the table of an earlier --out")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - ROWS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose of {', '.join(ROWS)}")
    out: Path = options.given or options.out
    out.mkdir(parents=True, exist_ok=True)
    failed = [] if options.given else measure(parts, out, quick=options.quick)
    figures = collected(out)
    rows = rows_of(figures)
    text = markdown(rows)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "table.json").write_text(
        json.dumps([{**dataclasses.asdict(row), "met": row.met} for row in rows], indent=1) + "\n", encoding="utf-8"
    )
    if "growth" in figures:
        plot(figures, out / "growth.png")
    print(text)
    for part in failed:
        print(f"{part} failed: {out / part}.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
