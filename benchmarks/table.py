"""The figures of all benchmarks as rows of one table, each beside its aim. Called by `python -m benchmarks`.

A row is one figure that somebody decides by. Rates of this machine mean little; ratios are taken in turns, within the
benchmark that gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

_MEETS: Final[dict[str, Callable[[float, float], bool]]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Row:
    """One figure. bound: ">=" or "<=", with the aim in the figure's own unit; "": nothing was aimed at."""

    part: str
    what: str
    value: float
    unit: str
    bound: str = ""
    aim: float = 0.0
    beside: str = ""

    @property
    def met(self) -> bool | None:
        return _MEETS[self.bound](self.value, self.aim) if self.bound else None


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """Rows of all parts that have figures, in the order of `ROWS`."""
    return [row for part, rows in ROWS.items() if part in figures for row in rows(figures[part])]


def markdown(rows: list[Row]) -> str:
    """A table for people."""
    lines = ["| part | what | figure | beside | aim | |", "|---|---|---:|---|---:|---|"]
    for row in rows:
        sign = {">=": "≥", "<=": "≤"}.get(row.bound, "")
        aim = f"{sign} {number(row.aim)} {row.unit}".strip() if row.bound else ""
        verdict = {True: "met", False: "**missed**", None: ""}[row.met]
        lines.append(f"| {row.part} | {row.what} | {number(row.value)} {row.unit} | {row.beside} | {aim} | {verdict} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _runs(f: dict[str, Any]) -> Iterator[Row]:
    rates, ratios, recovery, latency = f["runs_per_s"], f["ratio_to_bare"], f["recovery_s"], f["latency_s"]
    bare = f"bare Ray, {number(rates['bare'])} runs/s"
    yield Row("runs", "3 task steps a run", ratios["tasks"], "x", ">=", 0.9, f"{bare}; ours {number(rates['tasks'])}")
    yield Row("runs", "3 local steps a run", ratios["local"], "x", ">=", 3.5, f"{bare}; ours {number(rates['local'])}")
    for name, text in (("tasks", "task"), ("local", "local")):
        yield Row("runs", f"one run at a time, {text} steps, p50", latency[name]["p50"] * 1e3, "ms")
        yield Row("runs", f"one run at a time, {text} steps, p99", latency[name]["p99"] * 1e3, "ms")
    yield Row("runs", "start-up beyond ray.init", f["start_up_beyond_ray_s"], "s", "<=", 2.0)
    yield Row("runs", "the first run after it", f["first_run_s"], "s")
    kills = f"{recovery['kills']} SIGKILLs of run actors"
    yield Row("runs", "recovery, p50", recovery["p50"], "s", beside=kills)
    yield Row("runs", "recovery, p99", recovery["p99"], "s", "<=", 1.0, kills)
    yield Row("runs", "fdatasyncs a sequential step", f["fdatasyncs_a_step"], "", "<=", 1.0)


def _growth(f: dict[str, Any]) -> Iterator[Row]:
    for count, load in f.get("load", {}).items():
        beside = f"{number(load['runs_per_s'])} runs/s, p50 {number(load['p50_s'] * 1e3)} ms"
        yield Row("growth", f"{count} runs in flight, latency p99", load["p99_s"] * 1e3, "ms", beside=beside)
    for size, seconds in f.get("runs", {}).items():
        yield Row("growth", f"a run of 3 local steps, {int(size):,} at once", seconds * 1e3, "ms")
    if steps := f.get("steps"):
        beside = f"{number(steps['first_s'] * 1e6)} µs at the beginning"
        yield Row("growth", f"step {steps['steps']:,} against step 300", steps["ratio"], "x", "<=", 1.1, beside)
    if notice := f.get("notice"):
        beside = f"Ray's notice p50 {number(notice['notice_p50_s'] * 1e3)} ms"
        yield Row("growth", "recovery beyond Ray's own notice", notice["beyond_p50_s"] * 1e3, "ms", "<=", 100, beside)
    if parked := f.get("parked"):
        yield Row("growth", "memory of the controller a parked run", parked["bytes_a_run"] / 1e3, "kB")
    for count, nodes in f.get("nodes", {}).items():
        if count != "1":
            beside = f"{number(nodes['steps_per_s'])} steps/s of {int(count)} nodes"
            bound = ">=" if count == "4" else ""
            yield Row(
                "growth", f"{count} nodes against {count} times one", nodes["efficiency"], "x", bound, 0.8, beside
            )


def _retries(f: dict[str, Any]) -> Iterator[Row]:
    rates, ratios = f["per_s"], f["ratios"]
    five = f"5 x bare tasks ({number(rates['bare_tasks'])}/s)"
    yield Row("retries", "attempts by task steps", ratios["tasks_to_5_bare_tasks"], "x", ">=", 0.9, five)
    yield Row("retries", "attempts by local steps", rates["local_at_once"], "/s", ">=", 10_000)
    coded = f"JSON + CRC of the records, {number(rates['json_crc'])}/s"
    for name, key in (("task", "tasks"), ("local", "local")):
        many = rates[f"{key}_many"]
        yield Row("retries", f"attempts of 50-attempt steps, {name}", many, "/s", ">=", 20_000)
        yield Row("retries", f"the same, {name}", ratios[f"many_{key}_to_json_crc"], "x", ">=", 0.1, coded)
    for peer, text in (("dbos_sqlite", "DBOS on SQLite"), ("dbos_postgres", "DBOS on PostgreSQL")):
        for key, name, aim in (("tasks", "task", 10.0), ("local", "local", 25.0)):
            if (ratio := ratios.get(f"{key}_to_{peer}")) is not None:
                yield Row("retries", f"attempts by {name} steps", ratio, "x", ">=", aim, text)


def _breakers(f: dict[str, Any]) -> Iterator[Row]:
    aims = {"check,": 0.25, "check and record,": 0.5}
    for part, title in (("alone", "Ray not imported"), ("cluster", "in a cluster")):
        for name, row in f[part].items():
            aim = next((aim for what, aim in aims.items() if name.startswith(what)), None)
            if aim is not None and "async" not in name:
                yield Row("breakers", f"{name} ({title})", row["ratio"], "x", "<=", aim, "pybreaker, closed call")
    sent, refusal = f["messages_of_closed_calls"], f["refusal"]
    calls = f"{f['closed_calls_of_the_cluster']:,} closed calls"
    yield Row("breakers", "messages to the actor", sent, "", "<=", 0, calls)
    everywhere = f"{refusal['processes']} processes, {refusal['trips']} trips"
    yield Row("breakers", "failure to refusal everywhere, p50", refusal["last_s"]["p50"] * 1e3, "ms", beside=everywhere)
    yield Row("breakers", "the same, p99", refusal["last_s"]["p99"] * 1e3, "ms", "<=", 50, everywhere)


def _batches(f: dict[str, Any]) -> Iterator[Row]:
    rates = f["items_per_s"]
    bare = f"bare Ray, a task an item: {number(rates['bare'])}/s"
    yield Row("batches", f"map of {f['items']:,} no-ops, task workers", rates["map"], "/s", ">=", 10_000, bare)
    yield Row("batches", "the same, local", rates["map_local"], "/s")
    first, last = f["growth"][0], f["growth"][-1]
    grown = last["bytes_a_chunk"] / first["bytes_a_chunk"]
    yield Row("batches", f"journal a chunk, {last['chunks']:,} chunks against {first['chunks']:,}", grown, "x")


def _storage(f: dict[str, Any]) -> Iterator[Row]:
    if concurrent := f.get("concurrent"):
        beside = f"fdatasync/s of one file, {number(concurrent['syncs_per_s'])}"
        yield Row("storage", "events/s of 1,000 runs that all commit", concurrent["ratio"], "x", ">=", 5, beside)
    for grown in f.get("growth", ()):
        runs = f"{grown['runs']:,} runs"
        for name, seconds in grown["listing_s"].items():
            yield Row("storage", f"listing of {runs}: {name}", seconds * 1e3, "ms", "<=", 200)
        for name, asked in grown["sql"].items():
            if isinstance(asked, dict):
                beside = f"read_parquet, {number(asked['raw_s'] * 1e3)} ms"
                yield Row("storage", f"SQL over {runs}: {name}", asked["ratio"], "x", "<=", 1.25, beside)
    if compact := f.get("compact"):
        yield Row("storage", "compaction", compact["events_per_s"], "events/s")
    if upkeep := f.get("upkeep"):
        beside = f"{number(upkeep['alone_ms'])} ms alone"
        yield Row(
            "storage", "a run beside a compaction", upkeep["beside_ms"] - upkeep["alone_ms"], "ms more", beside=beside
        )
    if objects := f.get("objects"):
        beside = f"round trips/s, {number(1e3 / objects['round_trip_ms'])}"
        yield Row("storage", "events/s in a bucket", objects["ratio"], "x", ">=", 20, beside)


def _resume(f: dict[str, Any]) -> Iterator[Row]:
    beside = f"reading and decoding its file, {number(f['read and decode, s'] * 1e3)} ms"
    yield Row("resume", f"a run of {f['events']:,} events", f["ratio"], "x", beside=beside)


def _telemetry(f: dict[str, Any]) -> Iterator[Row]:
    cost = f["attempt, nothing asked for"] - f["attempt, before"]
    yield Row("telemetry", "an attempt, nothing asked for", cost, "µs more")


ROWS: Final[dict[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "runs": _runs,
    "growth": _growth,
    "retries": _retries,
    "breakers": _breakers,
    "batches": _batches,
    "storage": _storage,
    "resume": _resume,
    "telemetry": _telemetry,
}
