"""Random workflow programs with concurrency, whose result is known without running them.

A program is nested lists (JSON), so that it is an ordinary argument of one workflow, `interpret`. Whatever the order in
which its steps end, and whatever crashes on the way, its result is `expected(program)`. Used by the property tests, the
simulator's command line and the tests of replay in a fresh process.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import StepLostError
from pyworkflow_ray.step import step

Program = list[Any]

_FOREVER_S = 1e6


@step(max_recoveries=100_000)
def add(n: int) -> int:
    """n + 1."""
    return n + 1


@step(max_retries=3, retry_delay=[0.01, 0.01, 0.4], max_recoveries=100_000)  # two of them are recorded together
def flaky(n: int, failures: int) -> int:
    """n, after `failures` failures; the simulator's world counts them."""
    raise NotImplementedError("simulated")


@step(max_recoveries=100_000, durability="relaxed")
def hasty(n: int) -> int:
    """n + 1, without waiting for the record of a hasty step before it."""
    return n + 1


@step(max_recoveries=100_000)
def refuse(n: int) -> int:
    """Fails for good."""
    raise ValueError(f"refused {n}")


@step(max_recoveries=100_000, idempotent=False, max_retries=3, retry_delay=0.4)
def charge(n: int, failures: int) -> int:
    """n, after `failures` known failures; executed once where its outcome is unknown."""
    raise NotImplementedError("simulated")


@step(max_recoveries=100_000)
def broken(n: int) -> int:
    """Fails, and with it the run, until somebody mends it and resumes the run."""
    raise NotImplementedError("simulated")


LEAVES = ("add", "flaky", "refuse", "sleep", "branch", "charge", "hasty")
NODES = ("seq", "gather", "group", "wait", "completed", "long_timeout", "short_timeout", "cancel", "queue")


def generate(rng: random.Random, depth: int = 3, width: int = 3) -> Program:
    """A random program: `depth` levels of nodes of up to `width` children."""
    if depth == 0 or rng.random() < 0.25:
        leaf = rng.choice(LEAVES)
        n = rng.randint(0, 99)
        return {
            "add": ["add", n],
            "hasty": ["hasty", n, rng.randint(1, 4)],
            "flaky": ["flaky", n, rng.randint(0, 3)],
            "refuse": ["refuse", n],
            "sleep": ["sleep", rng.choice([0, 0.01, 0.3, 5])],
            "branch": ["branch", n],
            "charge": ["charge", n, rng.randint(0, 2)],
        }[leaf]
    node = rng.choice(NODES)
    if node in ("long_timeout", "short_timeout", "cancel"):
        return [node, generate(rng, depth - 1, width)]
    return [node, [generate(rng, depth - 1, width) for _ in range(rng.randint(1, width))]]


def expected(program: Program) -> int:
    """What `interpret` returns, by arithmetic alone."""
    match program:
        case ["add", n]:
            return int(n) + 1
        case ["hasty", n, count]:
            return int(n) + int(count)
        case ["flaky", n, _] | ["branch", n]:
            return int(n)
        case ["refuse", n]:
            return -int(n)
        case ["sleep", _] | ["short_timeout", _] | ["cancel", _] | ["charge", _, _]:
            return 0
        case ["broken", n]:
            return int(n)
        case ["stubborn", child, _] | ["tidy", child]:
            return expected(child)
        case ["long_timeout", child]:
            return expected(child)
        case [_, children]:
            return sum(map(expected, children))
    raise ValueError(f"no program: {program!r}")


def operators(program: Program) -> Counter[str]:
    """How often each operator stands in it: coverage of the generator."""
    counts = Counter([program[0]])
    for part in program[1:]:
        children = part if isinstance(part, list) and part and isinstance(part[0], list) else [part]
        for child in children:
            if isinstance(child, list) and child:
                counts += operators(child)
    return counts


async def interpret(program: Program) -> int:
    """The workflow: run the program."""
    total: int = await _OPERATORS[program[0]](*program[1:])
    return total


async def _add(n: int) -> int:
    return await add(n)


async def _hasty(n: int, count: int) -> int:
    for _ in range(count):
        n = await hasty(n)
    return n


async def _flaky(n: int, failures: int) -> int:
    return await flaky(n, failures)


async def _refuse(n: int) -> int:
    try:
        return await refuse(n)
    except ValueError:
        return -n


async def _charge(n: int, failures: int) -> int:
    """0, whether it was lost or not: which it was is left to chance."""
    try:
        return 0 * await charge(n, failures)
    except StepLostError:
        return 0


async def _broken(n: int) -> int:
    return await broken(n)


async def _stubborn(child: Program, again: bool) -> int:
    """Does not let itself be cancelled: it begins again, or does something else for ever."""
    while True:
        try:
            return await interpret(child)
        except asyncio.CancelledError:
            while not again:
                try:
                    await asyncio.sleep(0.4)
                except asyncio.CancelledError:
                    await add(0)


async def _tidy(child: Program) -> int:
    """Cleans up behind itself, which takes a while."""
    try:
        return await interpret(child)
    finally:
        await asyncio.sleep(0.5)
        await add(0)


async def _sleep(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return 0


async def _branch(n: int) -> int:
    """Both branches come to n; which is taken is decided by the run's own randomness."""
    run = current_workflow()
    assert run is not None, "interpret is a workflow"
    if run.random() < 0.5:
        return await add(n - 1)
    parts = await asyncio.gather(add(run.uuid4().int % 7), add(int(run.now().timestamp()) % 5))
    return n + 0 * sum(parts)


async def _seq(children: list[Program]) -> int:
    total = 0
    for child in children:
        total += await interpret(child)
    return total


async def _gather(children: list[Program]) -> int:
    return sum(await asyncio.gather(*map(interpret, children)))


async def _group(children: list[Program]) -> int:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(interpret(child)) for child in children]
    return sum(task.result() for task in tasks)


async def _wait(children: list[Program]) -> int:
    pending = {asyncio.create_task(interpret(child)) for child in children}
    total = 0
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            total += task.result() + 0 * await add(task.result() % 10)
    return total


async def _completed(children: list[Program]) -> int:
    total = 0
    for future in asyncio.as_completed([interpret(child) for child in children]):
        total += await future
    return total


async def _long_timeout(child: Program) -> int:
    async with asyncio.timeout(_FOREVER_S):
        return await interpret(child)


async def _short_timeout(child: Program) -> int:
    try:
        async with asyncio.timeout(0.5):
            await interpret(child)
    except TimeoutError:
        await add(0)
    return 0


async def _cancel(child: Program) -> int:
    task = asyncio.create_task(interpret(child))
    await add(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return 0


async def _queue(children: list[Program]) -> int:
    queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    async def produce() -> None:
        for child in children:
            await queue.put(await interpret(child))

    producer = asyncio.create_task(produce())
    total = 0
    for _ in children:
        total += await queue.get()
    await producer
    return total


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "hasty": _hasty,
    "flaky": _flaky,
    "refuse": _refuse,
    "charge": _charge,
    "broken": _broken,
    "stubborn": _stubborn,
    "tidy": _tidy,
    "sleep": _sleep,
    "branch": _branch,
    "seq": _seq,
    "gather": _gather,
    "group": _group,
    "wait": _wait,
    "completed": _completed,
    "long_timeout": _long_timeout,
    "short_timeout": _short_timeout,
    "cancel": _cancel,
    "queue": _queue,
}


class World:
    """The steps as the simulator executes them. `flaky` fails its first `failures` executions at each place."""

    def __init__(self) -> None:
        self._failed: Counter[tuple[int, int]] = Counter()
        self._refused: set[int] = set()
        self._mended: set[int] = set()

    def steps(self) -> dict[str, Callable[..., Any]]:
        """The functions by registered name."""
        return {
            add.definition.name: add.fn,
            hasty.definition.name: hasty.fn,
            flaky.definition.name: self._flaky,
            refuse.definition.name: refuse.fn,
            charge.definition.name: lambda n, failures: self._flaky(n + 1_000, failures) - 1_000,
            broken.definition.name: self._broken,
        }

    def mend(self) -> None:
        """Somebody mends what has failed so far."""
        self._mended |= self._refused

    def _broken(self, n: int) -> int:
        if n not in self._mended:
            self._refused.add(n)
            raise LookupError(f"broken {n}")
        return n

    def _flaky(self, n: int, failures: int) -> int:
        if self._failed[n, failures] < failures:
            self._failed[n, failures] += 1
            raise ConnectionError(f"failure {self._failed[n, failures]} of {failures}")
        return n
