"""A metastable failure, and what gets out of it: `python -m benchmarks.overload [--json FILE] [--plot FILE]`.

A real HTTP server that can serve CAPACITY requests a second is called at 0.8 of that by many processes of a Ray
cluster, through steps with three retries. For ten seconds it serves nothing. With bare retries it then stays down for
good, though it is healthy: every request waits in its queue for longer than its client does, so that all its work is
wasted, and each failed call is made four times (N. Bronson et al., "Metastable Failures in Distributed Systems",
HotOS 2021; L. Huang et al., "Metastable Failures in the Wild", OSDI 2022). The same is measured with a retry budget, a
circuit breaker, and both with a ramp. Load and goodput are counted by the server.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyworkflow_ray as pw
from benchmarks.local_ray import start_ray

CAPACITY, OFFERED = 50.0, 40.0  # requests a second
QUEUE_S, TIMEOUT_S = 2.0, 0.5
FREEZE_AT_S, THAW_AT_S, END_S = 10.0, 20.0, 45.0
SLOT_S = 0.5
SAMPLE_S = 0.25  # of the breaker's state
MODES = ("bare", "budget", "breaker", "all")
TITLES = {"bare": "bare retries", "budget": "budget only", "breaker": "breaker only", "all": "budget, breaker and ramp"}

RETRIES: dict[str, Any] = {"max_retries": 3, "retry_delay": 0.1, "retry_backoff": 2, "timeout": TIMEOUT_S}
TRIPS: dict[str, Any] = {"failure_rate": 0.5, "minimum_calls": 20, "window": "5s", "recovery_timeout": 2}
alone = pw.CircuitBreaker("overload-alone", **TRIPS)
together = pw.CircuitBreaker("overload-together", ramp=3, **TRIPS)
BREAKERS = {"breaker": alone, "all": together}

_sessions: dict[int, Any] = {}  # one a loop


async def get(url: str) -> int:
    """One request."""
    import aiohttp

    loop = asyncio.get_running_loop()
    session = _sessions.get(id(loop))
    if session is None:
        session = _sessions[id(loop)] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with session.get(url) as response:
        response.raise_for_status()
        return int(response.status)


@pw.step(**RETRIES)
async def bare(url: str) -> int:
    """Retries, and nothing that bounds them all together."""
    return await get(url)


@pw.step(**RETRIES, retry_budget=pw.RetryBudget("overload-alone"))
async def budget(url: str) -> int:
    """Retries that a budget of the cluster bounds."""
    return await get(url)


@pw.step(**RETRIES, breaker=alone)
async def breaker(url: str) -> int:
    """Retries within a breaker of the cluster."""
    return await get(url)


@pw.step(**RETRIES, breaker=together, retry_budget=pw.RetryBudget("overload-together"))
async def all_together(url: str) -> int:
    """Budget and breaker; after closing it lets calls in along a ramp."""
    return await get(url)


CALLS = {"bare": bare, "budget": budget, "breaker": breaker, "all": all_together}


class Client:
    """One process that calls at a nearly even pace, whatever becomes of its calls."""

    async def ready(self, url: str) -> int:
        """Its pid, once it has made a call of each mode: what it loads at the first one is no part of the story."""
        for call in CALLS.values():
            await call(url)
        return os.getpid()

    async def call(self, mode: str, url: str, rate: float, begins_at: float, seed: str) -> dict[str, int]:
        """Calls until END_S after `begins_at`; how they ended."""
        rng, ends, running = random.Random(seed), collections.Counter[str](), set[asyncio.Task[None]]()

        async def one() -> None:
            ends["calls"] += 1
            if FREEZE_AT_S <= time.time() - begins_at < THAW_AT_S:
                ends["calls_while_frozen"] += 1
            try:
                await CALLS[mode](url)
                ends["succeeded"] += 1
            except Exception as error:
                ends[type(error).__name__] += 1

        at = begins_at + rng.uniform(0, 1 / rate)
        while at < begins_at + END_S:
            at += rng.uniform(0.5, 1.5) / rate
            await asyncio.sleep(max(0.0, at - time.time()))
            task = asyncio.create_task(one())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        return dict(ends)


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def one_mode(mode: str, clients: list[Any], url: str, seed: int) -> dict[str, Any]:
    """The whole story of one mode."""
    import ray

    begins_at = time.time() + 5.0
    ask(f"{url}/begin?at={begins_at}")
    refs = [
        client.call.remote(mode, f"{url}/work", OFFERED / len(clients), begins_at, f"{seed} {mode} {n}")
        for n, client in enumerate(clients)
    ]
    states: list[tuple[float, str]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            states.append((round(time.time() - begins_at, 2), BREAKERS[mode].state.value))

    watch = threading.Thread(target=sample, daemon=True)
    if mode in BREAKERS:
        watch.start()
    time.sleep(max(0.0, begins_at + FREEZE_AT_S - time.time()))
    ask(f"{url}/freeze")
    time.sleep(max(0.0, begins_at + THAW_AT_S - time.time()))
    ask(f"{url}/thaw")
    ends = sum((collections.Counter(end) for end in ray.get(refs)), collections.Counter[str]())
    over.set()
    log = {int(slot): counts for slot, counts in json.loads(ask(f"{url}/log")).items()}
    slots = range(int(END_S / SLOT_S))
    series = {
        what: [log.get(slot, {}).get(what, 0) / SLOT_S for slot in slots]
        for what in ("arrived", "good", "wasted", "turned_away")
    }
    return {"per_s": series, "breaker": states, "calls": dict(ends), **judge(series, ends["calls_while_frozen"])}


def judge(series: dict[str, list[float]], calls_while_frozen: int) -> dict[str, Any]:
    """What the aims are about: goodput before, when it was back, and what a frozen server had to bear."""

    def mean(what: str, begin_s: float, end_s: float) -> float:
        return statistics.fmean(series[what][int(begin_s / SLOT_S) : int(end_s / SLOT_S)])

    before = mean("good", 4.0, FREEZE_AT_S)
    back_after = None
    after_s = 0.0
    while THAW_AT_S + after_s + 3.0 <= END_S:  # back: from here on it is good for three seconds
        if mean("good", THAW_AT_S + after_s, THAW_AT_S + after_s + 3.0) >= 0.95 * before:
            back_after = after_s
            break
        after_s += SLOT_S
    arrived_while_frozen = sum(series["arrived"][int(FREEZE_AT_S / SLOT_S) : int(THAW_AT_S / SLOT_S)]) * SLOT_S
    return {
        "goodput_before": before,
        "goodput_at_the_end": mean("good", END_S - 10.0, END_S),
        "load_at_the_end": mean("arrived", END_S - 10.0, END_S),
        "back_after_s": back_after,
        "load_while_frozen": arrived_while_frozen / max(1, calls_while_frozen),
    }


def measure(processes: int, seed: int) -> dict[str, Any]:
    """All modes, one after another, as JSON."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # else they would stand back behind the server
    start_ray()
    pw.init(storage=Path(tempfile.mkdtemp(prefix="pyworkflow-ray-bench-")) / "storage", log_level="CRITICAL")
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.overload_server", str(CAPACITY), str(int(CAPACITY * QUEUE_S))],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        clients = [ray.remote(num_cpus=0, max_concurrency=1000)(Client).remote() for _ in range(processes)]
        pids = [ray.get(client.ready.remote(f"{url}/work"), timeout=600) for client in clients]
        assert len(set(pids)) == processes
        modes = {mode: one_mode(mode, clients, url, seed) for mode in MODES}
    finally:
        server.terminate()
        server.wait(timeout=10)
        pw.shutdown()
        ray.shutdown()
    return {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
        "processes": processes,
        "seed": seed,
        "capacity_per_s": CAPACITY,
        "offered_per_s": OFFERED,
        "timeout_s": TIMEOUT_S,
        "queue_s": QUEUE_S,
        "frozen_s": [FREEZE_AT_S, THAW_AT_S],
        "slot_s": SLOT_S,
        "modes": modes,
    }


def plot(figures: dict[str, Any], file: Path) -> None:
    """Offered load, goodput and breaker state over time, a panel a mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    slot = figures["slot_s"]
    begin, end = figures["frozen_s"]
    colours = {"open": "#e8590c", "half_open": "#fab005", "closed": "#69db7c"}
    top = 4.4 * figures["capacity_per_s"]
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, sharey=True)
    for panel, mode in zip(panels.flat, MODES, strict=True):
        data = figures["modes"][mode]
        times = [slot * (n + 0.5) for n in range(len(data["per_s"]["good"]))]
        panel.axvspan(begin, end, color="#dee2e6", lw=0)
        panel.text((begin + end) / 2, 0.94 * top, "server frozen", ha="center", va="top", fontsize=8, color="#495057")
        panel.axhline(figures["capacity_per_s"], color="#868e96", lw=1, ls=":")
        panel.plot(times, data["per_s"]["arrived"], color="#c92a2a", lw=1.6)
        panel.fill_between(times, data["per_s"]["good"], color="#1971c2", alpha=0.35, lw=0)
        panel.plot(times, data["per_s"]["good"], color="#1971c2", lw=1.6)
        for (at, state), (until, _) in zip(data["breaker"], data["breaker"][1:], strict=False):
            panel.axvspan(at, until, 0.955, 1.0, color=colours[state], lw=0)
        back = data["back_after_s"]
        said = "stays down" if back is None else f"back {back:g} s after healing"
        panel.set_title(f"{TITLES[mode]}: {said}", fontsize=11)
        panel.set_xlim(0, times[-1])
        panel.set_ylim(0, top)
        panel.grid(alpha=0.25, lw=0.5)
    for panel in panels[1]:
        panel.set_xlabel("seconds")
    for panel in panels[:, 0]:
        panel.set_ylabel("requests a second")
    handles = [
        pyplot.Line2D([], [], color="#c92a2a", label="load at the server"),
        pyplot.Line2D([], [], color="#1971c2", label="goodput: answered in time"),
        pyplot.Line2D([], [], color="#868e96", ls=":", label="capacity"),
        *(Patch(color=colour, label=f"breaker {state.replace('_', '-')}") for state, colour in colours.items()),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=100)
    if file.suffix == ".png":  # a few colours do, at a third of the size
        from PIL import Image

        Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True)


def table(figures: dict[str, Any]) -> str:
    """The figures as rows of text, each beside its aim."""
    load = f"{figures['offered_per_s']:g} calls/s of {figures['capacity_per_s']:g}"
    lines = [
        f"{figures['processes']} processes, {load}, frozen for {THAW_AT_S - FREEZE_AT_S:g} s",
        f"{'':<28}{'before':>8}{'at the end':>12}{'load then':>11}{'back after':>12}{'load while frozen':>19}",
    ]
    for mode, data in figures["modes"].items():
        back = "never" if data["back_after_s"] is None else f"{data['back_after_s']:g} s"
        lines.append(
            f"{TITLES[mode]:<28}{data['goodput_before']:>6.0f}/s{data['goodput_at_the_end']:>10.0f}/s"
            f"{data['load_at_the_end']:>9.0f}/s{back:>12}{data['load_while_frozen']:>12.2f} x calls"
        )
    lines.append("aims, of all together: back after at most 10 s; load while frozen at most 1.10 x the calls")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write JSON and plot; or plot what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (.png or .svg)")
    parser.add_argument("--from", dest="given", type=Path, help="draw the figures of an earlier --json")
    options = parser.parse_args()
    figures = json.loads(options.given.read_text()) if options.given else measure(options.processes, options.seed)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    # As a module its steps and breakers have names that the client processes know.
    from benchmarks import overload

    overload.main()
