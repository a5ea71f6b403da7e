"""Guarded calls beside pybreaker, aiobreaker and purgatory, and how fast a cluster refuses: `python -m
benchmarks.breakers [--json FILE]`.

The cost of a closed call is measured in one process, interleaved: round by round, each row in turn, so that a noisy
machine hits all of them alike; a ratio is the median of the rounds' ratios. First where Ray is not even imported, then
as a process of a cluster. Redis is a real server on a Unix socket, where `redis-server` is installed (Debian's
`apt-get install redis-server`). "Check" is the admission alone; "check and record" is a whole call of a decorated
function, as each peer decorates it.

How fast a cluster refuses: processes of a cluster call through one breaker all the time. One of them fails, which trips
it. Measured is the time from that failure to the first refusal in the last process, on the one clock of the machine;
and the calls that were still let through after it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.local_ray import start_ray
from benchmarks.runs import percentile

CHECK, RECORD = "check", "check and record"
BASE = "pybreaker"
SETTLE_S = 1.0


def service() -> int:
    return 1


async def async_service() -> int:
    return 1


# A closed call ---------------------------------------------------------------------------------------------------


def checked(breaker: Any) -> Callable[[], None]:
    """The admission alone, as a decorated function asks for it; nothing is recorded."""

    def check() -> None:
        breaker._circuit().enter_frame()

    return check


def peers(redis: Any) -> dict[str, Callable[[], Any]]:
    """The sync rows of others, each made as its documentation says."""
    import purgatory
    import pybreaker

    rows: dict[str, Callable[[], Any]] = {
        "no breaker": service,
        BASE: pybreaker.CircuitBreaker()(service),
        "purgatory": purgatory.SyncCircuitBreakerFactory()("closed")(service),
    }
    if redis is not None:
        storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, redis)
        rows["pybreaker on Redis"] = pybreaker.CircuitBreaker(state_storage=storage)(service)
    return rows


def async_peers() -> dict[str, Callable[[], Awaitable[Any]]]:
    import aiobreaker
    import purgatory

    return {
        "no breaker, async": async_service,
        "aiobreaker, async": aiobreaker.CircuitBreaker()(async_service),
        "purgatory, async": purgatory.AsyncCircuitBreakerFactory()("closed")(async_service),
    }


def ours(name: str, where: str) -> dict[str, Callable[[], Any]]:
    from pyworkflow_ray.breaker import CircuitBreaker

    breaker = CircuitBreaker(name)
    return {f"{CHECK}, {where}": checked(breaker), f"{RECORD}, {where}": breaker.call(service)}


def seconds_a_call(call: Callable[[], Any], calls: int) -> float:
    times = range(calls)
    began = time.perf_counter()
    for _ in times:
        call()
    return (time.perf_counter() - began) / calls


async def seconds_an_await(call: Callable[[], Awaitable[Any]], calls: int) -> float:
    times = range(calls)
    began = time.perf_counter()
    for _ in times:
        await call()
    return (time.perf_counter() - began) / calls


def closed_calls(
    rows: dict[str, Callable[[], Any]],
    async_rows: dict[str, Callable[[], Awaitable[Any]]],
    rounds: int,
    calls: int,
) -> dict[str, list[float]]:
    """Seconds a call of each row in each round."""

    async def measure() -> dict[str, list[float]]:
        for warm in rows.values():
            seconds_a_call(warm, calls)
        seconds: dict[str, list[float]] = {name: [] for name in [*rows, *async_rows]}
        for _ in range(rounds):
            for name, row in rows.items():
                seconds[name].append(seconds_a_call(row, calls // 20 if "Redis" in name else calls))
            for name, async_row in async_rows.items():
                seconds[name].append(await seconds_an_await(async_row, calls))
        return seconds

    return asyncio.run(measure())


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median and spread of each row, and its ratio to the base of the same round."""
    base = seconds[BASE]
    return {
        name: {
            "ns": statistics.median(values) * 1e9,
            "spread_ns": [min(values) * 1e9, max(values) * 1e9],
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
        }
        for name, values in seconds.items()
    }


@contextmanager
def redis_server() -> Iterator[Any]:
    """A client of a real server that keeps nothing on disk; None where there is no server."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    import redis

    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        socket = os.path.join(folder, "s")
        options = ["--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(unix_socket_path=socket)
            until = time.monotonic() + 20
            while not os.path.exists(socket) and time.monotonic() < until:
                time.sleep(0.01)
            client.ping()
            yield client
        finally:
            server.terminate()
            server.wait()


# A cluster that refuses ------------------------------------------------------------------------------------------


class Caller:
    """A process that calls through the breaker all the time, from a thread of its own."""

    def __init__(self, breaker: Any, period_s: float) -> None:
        self.breaker = breaker
        self.period_s = period_s
        self.guarded = breaker.call(service)
        self.admitted: list[float] = []
        self.refused_at: float | None = None
        self.calling = False

    def begin(self) -> None:
        """From now on, until the first refusal."""
        self.guarded()  # it has heard that the breaker is closed again
        self.admitted, self.refused_at, self.calling = [], None, True
        self.thread = threading.Thread(target=self._call, daemon=True)
        self.thread.start()

    def fail(self) -> float:
        """Trip the breaker; the instant of the failure."""
        try:
            with self.breaker:
                at = time.monotonic()
                raise ConnectionError("503")
        except ConnectionError:
            return at

    def end(self) -> tuple[float | None, list[float]]:
        """When it was refused, and when its last calls were let through."""
        self.thread.join(30.0)
        self.calling = False
        return self.refused_at, self.admitted[-100:]

    def pid(self) -> int:
        return os.getpid()

    def _call(self) -> None:
        from pyworkflow_ray.errors import CircuitOpenError

        while self.calling:
            at = time.monotonic()
            try:
                self.guarded()
            except CircuitOpenError:
                self.refused_at = time.monotonic()
                return
            self.admitted.append(at)
            time.sleep(self.period_s)


def refusals(ray: Any, processes: int, trips: int, period_s: float) -> dict[str, Any]:
    """Seconds from each tripping failure to the refusal in the last process, and the calls let through after it."""
    from pyworkflow_ray.breaker import CircuitBreaker

    breaker = CircuitBreaker(f"bench-{uuid.uuid4().hex}", failure_threshold=1, recovery_timeout=3600)
    actor = ray.remote(Caller).options(num_cpus=0)
    callers = [actor.remote(breaker, period_s) for _ in range(processes)]
    assert len(set(ray.get([caller.pid.remote() for caller in callers]))) == processes
    last, each, leaked = [], [], []
    for n in range(trips):
        breaker.reset()
        _until_closed(ray, callers)
        time.sleep(0.05 + period_s * (n % 7) / 7)  # a trip at any time of a caller's period
        tripped_at = ray.get(callers[n % processes].fail.remote())
        time.sleep(SETTLE_S)  # asking fifty processes how it went takes the CPU from those that have yet to hear
        ended = ray.get([caller.end.remote() for caller in callers])
        refused = [at - tripped_at for at, _ in ended if at is not None]
        assert len(refused) == processes, "a process was never refused"
        last.append(max(refused))
        each += refused
        leaked.append(sum(at > tripped_at for _, admitted in ended for at in admitted))
    for caller in callers:
        ray.kill(caller)
    return {
        "processes": processes,
        "trips": trips,
        "calls_a_second": processes / period_s,
        "last_s": {"p50": percentile(last, 0.5), "p99": percentile(last, 0.99), "max": max(last)},
        "each_s": {"p50": percentile(each, 0.5), "p99": percentile(each, 0.99)},
        "leaked_a_trip": {"p50": percentile(leaked, 0.5), "p99": percentile(leaked, 0.99), "max": max(leaked)},
    }


def _until_closed(ray: Any, callers: list[Any]) -> None:
    """All call again. A process that has not heard of the reset yet asks once more."""
    waiting = list(callers)
    while waiting:
        answers = [(caller, caller.begin.remote()) for caller in waiting]
        waiting = []
        for caller, answer in answers:
            try:
                ray.get(answer)
            except ray.exceptions.RayTaskError:
                waiting.append(caller)


# All of it --------------------------------------------------------------------------------------------------------


def measure(rounds: int, calls: int, processes: int, trips: int, period_s: float) -> dict[str, Any]:
    """All figures, as JSON."""
    from pyworkflow_ray.breaker import CircuitBreaker

    assert "ray" not in sys.modules
    alone_async = CircuitBreaker("bench-alone-async").call(async_service)
    with redis_server() as redis:
        alone = closed_calls(
            {**peers(redis), **ours("bench-alone", "in process")},
            {**async_peers(), f"{RECORD}, async": alone_async},
            rounds,
            calls,
        )
    import ray

    start_ray()
    breaker = CircuitBreaker(f"bench-{uuid.uuid4().hex}")
    assert breaker.state == "closed"  # its actor lives
    messages = _count_messages(breaker)
    together = closed_calls({**peers(None), **ours(breaker.name, "of a cluster")}, {}, rounds, calls)
    figures = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__},
        "alone": summary(alone),
        "cluster": summary(together),
        "closed_calls_of_the_cluster": 2 * calls * (rounds + 1),
        "messages_of_closed_calls": len(messages),
        "refusal": refusals(ray, processes, trips, period_s),
    }
    ray.shutdown()
    return figures


def _count_messages(breaker: Any) -> list[Any]:
    """From now on, all that this process sends to the breaker's actor."""
    channel, sent = breaker._circuit().channel, []
    send = channel._send

    async def counting(messages: list[Any]) -> Any:
        sent.append(messages)
        return await send(messages)

    channel._send = counting
    return sent


def table(figures: dict[str, Any]) -> str:
    """The figures as rows of text, each beside its aim."""
    aims = {CHECK: "aim 0.25 x", RECORD: "aim 0.5 x"}
    rows = []
    for part, title in (("alone", "Ray not imported"), ("cluster", "a process of a cluster")):
        rows.append((f"closed calls, {title}", "", ""))
        for name, row in figures[part].items():
            aim = "" if "async" in name else next((a for what, a in aims.items() if name.startswith(f"{what},")), "")
            rows.append((f"  {name}", f"{row['ns']:.0f} ns, {row['ratio']:.2f} x {BASE}", aim))
    refusal = figures["refusal"]
    last, leaked = refusal["last_s"], refusal["leaked_a_trip"]
    rows += [
        (
            f"messages of {figures['closed_calls_of_the_cluster']} closed calls",
            f"{figures['messages_of_closed_calls']}",
            "aim 0",
        ),
        (
            f"failure to refusal in {refusal['processes']} processes",
            f"p50 {last['p50'] * 1000:.1f} ms, p99 {last['p99'] * 1000:.1f} ms ({refusal['trips']} trips)",
            "aim p99 50 ms",
        ),
        (
            f"let through after it, of {refusal['calls_a_second']:.0f} calls/s",
            f"p50 {leaked['p50']:.0f}, p99 {leaked['p99']:.0f} calls",
            "",
        ),
    ]
    return "\n".join(f"{name:<44}{value:<44}{aim}".rstrip() for name, value, aim in rows)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=2_000, help="calls of each row a round")
    parser.add_argument("--processes", type=int, default=50)
    parser.add_argument("--trips", type=int, default=100)
    parser.add_argument("--period", type=float, default=0.01, help="seconds between two calls of a process")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.rounds, options.calls, options.processes, options.trips, options.period)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
