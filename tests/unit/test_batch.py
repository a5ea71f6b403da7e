"""`Step.map` as it is asked for, plain calls of it, and what a `BatchResult` says."""

from __future__ import annotations

import asyncio
import itertools
import math
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.batch import CHUNK_MAX, MapOptions
from tests.unit.engine.crashing import CrashingRun, World

RUNNING: list[int] = []


@pw.step(max_retries=1, retry_delay=0)
def root(n: float) -> float:
    return math.sqrt(n)


@pw.step
async def crowd(n: int) -> int:
    RUNNING.append(n)
    await asyncio.sleep(0)
    most = len(RUNNING)
    await asyncio.sleep(0)
    RUNNING.remove(n)
    if n == 3:
        raise LookupError(n)
    return most


def batch(failed: dict[int, Exception], total: int, **fields: Any) -> pw.BatchResult[int]:
    results = [failed.get(n, n) for n in range(total)]
    return pw.BatchResult(results, sorted(failed.items()), **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency=0 is not allowed: a whole number ≥ 1"),
        ({"concurrency": True}, "concurrency=True is not allowed"),
        ({"chunk_size": 1.5}, "chunk_size=1.5 is not allowed: a whole number ≥ 1"),
        ({"max_failures": -1}, "max_failures=-1 is not allowed: a whole number ≥ 0"),
        ({"max_ratio": 2}, "max_ratio=2 is not allowed: a number from 0 to 1"),
    ],
)
async def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pw.ConfigurationError, match=message):
        await root.map([1], **options)


async def test_what_can_not_be_iterated_and_steps_of_other_signatures_are_refused() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(pw.ConfigurationError, match="items is a int, which can't be iterated"):
        await root.map(3)  # type: ignore[arg-type]
    with pytest.raises(pw.ConfigurationError, match="async_generator, which can't be iterated; collect it in a step"):
        await root.map(numbers())  # type: ignore[arg-type]

    @pw.step
    def two(a: int, b: int) -> None: ...

    with pytest.raises(TypeError, match="missing a required argument: 'b'"):
        await two.map([1])


def test_default_chunks_are_a_quarter_of_an_even_share() -> None:
    def chunk(items: Any, step: Any = root, concurrency: int | None = None) -> int:
        return MapOptions.checked(step, items, concurrency, None, None, None).chunk_size

    assert [chunk(range(n)) for n in (0, 1, 20, 3200, 10**6)] == [1, 1, 1, 100, CHUNK_MAX]
    assert chunk(iter([1])) == 100
    assert chunk(range(100), concurrency=1) == 25
    assert chunk(range(10**6), root.options(idempotent=False)) == 1


async def test_outside_of_a_workflow_items_are_plain_calls() -> None:
    done = await root.map([4, "9", -1, 16])
    assert done.results[:2] == [2.0, 3.0]
    assert [(index, type(error)) for index, error in done.failed] == [(2, ValueError)]
    assert done.succeeded == [2.0, 3.0, 4.0]
    assert done.failed_items == {2: -1}


async def test_plain_items_of_an_async_step_run_so_many_at_a_time() -> None:
    done = await crowd.map(range(10), concurrency=4)
    assert max(done.succeeded) == 4
    assert [index for index, _ in done.failed] == [3]
    assert len(done) == 10


async def test_a_plain_map_over_an_endless_iterable_stops_early() -> None:
    done = await root.map(itertools.count(-3), max_failures=1)
    assert (len(done), done.stopped) == (2, "2 items failed (max_failures=1)")


async def test_plain_failed_items_are_mapped_again_in_their_places() -> None:
    lenient = True

    @pw.step
    def sometimes(n: int) -> int:
        if n % 2 and not lenient:
            raise ConnectionError(n)
        return n

    lenient = False
    first = await sometimes.map(range(5))
    lenient = True
    again = await first.rerun_failed()
    assert (again.results, again.failed, again.failed_items) == ([0, 1, 2, 3, 4], [], {})


def test_failures_above_the_limits_are_raised_as_a_group_that_counts_them() -> None:
    failed = batch({1: ValueError("a"), 4: ConnectionError("b"), 5: ValueError("c")}, 30)
    with pytest.raises(ExceptionGroup, match=r"3 of 30 items failed \(ValueError 2, ConnectionError 1\)") as caught:
        failed.raise_if_failed()
    assert [str(error) for error in caught.value.exceptions] == ["a", "b", "c"]
    failed.raise_if_failed(max_failures=3)
    failed.raise_if_failed(max_ratio=0.1)
    for limits in ({"max_failures": 2}, {"max_ratio": 0.09}, {"max_failures": 2, "max_ratio": 0.5}):
        with pytest.raises(ExceptionGroup):
            failed.raise_if_failed(**limits)  # type: ignore[arg-type]
    batch({}, 30).raise_if_failed()
    batch({}, 0).raise_if_failed(max_ratio=0.0)


def test_a_group_of_very_many_failures_holds_the_first_and_counts_all() -> None:
    many = batch({n: ValueError(n) for n in range(5000)}, 5000)
    with pytest.raises(ExceptionGroup, match="5000 of 5000 items failed") as caught:
        many.raise_if_failed()
    assert len(caught.value.exceptions) == 1000


def test_a_batch_says_in_words_what_it_came_to_and_survives_pickle() -> None:
    failed = batch({1: ValueError("a")}, 3, stopped="1 items failed (max_failures=0)", not_done=[2])
    assert str(failed) == "1 of 2 items failed (ValueError 1); stopped early: 1 items failed (max_failures=0)"
    assert failed.succeeded == [0]
    assert failed.by_type == {"ValueError": 1}
    assert pickle.loads(pickle.dumps(failed)).not_done == [2]


def test_what_waits_for_a_run_is_refused_for_items() -> None:
    @pw.step
    def plain(n: int) -> int:
        return n

    plain.definition.given = {"on_exhausted": "pause"}

    async def flow() -> None:
        await plain.map([1])

    run = CrashingRun(flow, World((plain,))).run()
    assert run.ending()[1] == "ConfigurationError"
    assert "on_exhausted='pause' is not available for the items of a map" in run.ending()[2]
