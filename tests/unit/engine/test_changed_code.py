"""Changed code against a recorded history: caught always, never on unchanged code, and nothing is executed."""

from __future__ import annotations

import asyncio
import random

import pytest

from pyworkflow_ray.engine.commands import Append, Dispatch, Pause
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.step import step
from pyworkflow_ray.testing.simulator import Simulator


@step
def first(n: int) -> int:
    return n


@step
def second(n: int) -> int:
    return n


@step(name="first-renamed")
def renamed(n: int) -> int:
    return n


STEPS = {s.definition.name: s.fn for s in (first, second)}


async def recorded(n):
    a = await first(n)
    await asyncio.sleep(100)
    b = await second(a)
    await asyncio.gather(first(1), second(2))
    if b == n:
        await first(9)
    await asyncio.sleep(50)
    return b


async def reordered(n):
    a = await second(n)
    await asyncio.sleep(100)
    b = await first(a)
    await asyncio.gather(first(1), second(2))
    await first(9)
    await asyncio.sleep(50)
    return b


async def reordered_gather(n):
    a = await first(n)
    await asyncio.sleep(100)
    b = await second(a)
    await asyncio.gather(second(2), first(1))
    await first(9)
    await asyncio.sleep(50)
    return b


async def inserted(n):
    await second(0)
    return await recorded(n)


async def deleted(n):
    a = await first(n)
    b = await second(a)
    await asyncio.gather(first(1), second(2))
    await first(9)
    await asyncio.sleep(50)
    return b


async def step_renamed(n):
    a = await renamed(n)
    await asyncio.sleep(100)
    return await second(a)


async def other_argument(n):
    a = await first(n + 1)
    await asyncio.sleep(100)
    return await second(a)


async def other_keyword(n):
    a = await first(n=n)
    await asyncio.sleep(100)
    return await second(a)


async def other_delay(n):
    a = await first(n)
    await asyncio.sleep(101)
    return await second(a)


async def other_branch(n):
    a = await first(n)
    await asyncio.sleep(100)
    b = await second(a)
    await asyncio.gather(first(1), second(2))
    if b != n:
        await first(9)
    await asyncio.sleep(50)
    return b


async def early_return(n):
    await first(n)
    return 0


async def another_task(n):
    a = await asyncio.create_task(first(n))
    await asyncio.sleep(100)
    return await second(a)


async def raises(n):
    raise RuntimeError("new code")


def history_of(flow):
    """Its events up to the last sleep of 50 s: unfinished."""
    events = Simulator(flow, STEPS, args=(5,), seed=3).run().events
    last = max(i for i, e in enumerate(events) if e.type == "run_parked")
    return events[: last + 1]


def activate(flow, events):
    simulator = Simulator(flow, STEPS)
    driver = Driver(flow, simulator.codec, rng=random.Random(0))
    epoch = sum(e.type == "run_activated" for e in events)
    now = events[-1].at + 1
    driver.activate(events, RunActivated(epoch=epoch, cause="wake"), now)
    effects = driver.effects()
    for effect in list(effects):
        if isinstance(effect, Append):
            driver.durable(effect.events[-1].seq, now)
    return effects + driver.effects()


CHANGES = [
    reordered,
    reordered_gather,
    inserted,
    deleted,
    step_renamed,
    other_argument,
    other_keyword,
    other_delay,
    other_branch,
    early_return,
    another_task,
    raises,
]


@pytest.mark.parametrize("changed", CHANGES, ids=lambda flow: flow.__name__)
def test_changed_code_pauses_the_run_and_executes_nothing(changed):
    effects = activate(changed, history_of(recorded))
    pauses = [e for e in effects if isinstance(e, Pause)]
    assert len(pauses) == 1
    assert not any(isinstance(e, Dispatch) for e in effects)
    event = pauses[0].event
    assert event.reason == "nondeterminism"
    assert "Nothing was executed" in event.message
    assert "simulated" in event.message
    assert event.details["recorded"]
    assert event.details["attempted"]
    assert event.details["remedy"]


def test_unchanged_code_is_never_accused():
    events = history_of(recorded)
    for cut in range(2, len(events)):
        assert not any(isinstance(e, Pause) for e in activate(recorded, events[:cut])), f"cut {cut}"


def test_each_prefix_of_the_changed_part_is_caught_where_it_is_reached():
    events = history_of(recorded)
    at = next(i for i, e in enumerate(events) if e.type == "step_scheduled")
    for cut in range(at + 1, len(events) + 1):
        assert any(isinstance(e, Pause) for e in activate(reordered, events[:cut])), f"cut {cut}"
