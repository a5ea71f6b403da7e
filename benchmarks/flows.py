"""The work that is measured: three no-op steps a run, by tasks, by local steps, and by bare Ray."""

from __future__ import annotations

from pyworkflow_ray import step, workflow


@step
def task_step(n: int) -> int:
    """A no-op as a Ray task."""
    return n + 1


@step(executor="local")
def local_step(n: int) -> int:
    """A no-op in the run's actor."""
    return n + 1


@workflow
async def three_tasks(n: int) -> int:
    """Three task steps, one after another."""
    for _ in range(3):
        n = await task_step(n)
    return n


@workflow
async def three_local(n: int) -> int:
    """Three local steps, one after another."""
    for _ in range(3):
        n = await local_step(n)
    return n


@step
def slow_step(seconds: float) -> float:
    """Busy for a while, so that its run can be killed."""
    import time

    time.sleep(seconds)
    return seconds


@workflow
async def ten_slow(seconds: float) -> int:
    """Ten slow steps."""
    for _ in range(10):
        await slow_step(seconds)
    return 10


@workflow
async def map_tasks(items: int, chunk: int) -> int:
    """A map of no-op items over task workers."""
    batch = await task_step.map(range(items), concurrency=8, chunk_size=chunk)
    batch.raise_if_failed()
    return len(batch)


@workflow
async def map_local(items: int, chunk: int) -> int:
    """A map of no-op items in the run's actor."""
    batch = await local_step.map(range(items), concurrency=2, chunk_size=chunk)
    batch.raise_if_failed()
    return len(batch)


@workflow
async def gather_singles(items: int) -> int:
    """No-op steps, a call an item, all at once."""
    import asyncio

    return len(await asyncio.gather(*(task_step(n) for n in range(items))))


@workflow
async def many_local(steps: int) -> int:
    """So many local steps, one after another."""
    done = 0
    for _ in range(steps):
        done = await local_step(done)
    return done


@workflow
async def asleep(seconds: float) -> None:
    """Parked for so long."""
    from pyworkflow_ray import sleep

    await sleep(seconds)


@workflow
async def waiting(steps: int, seconds: float) -> int:
    """Steps that wait, all at once."""
    import asyncio

    return len(await asyncio.gather(*(slow_step(seconds) for _ in range(steps))))
