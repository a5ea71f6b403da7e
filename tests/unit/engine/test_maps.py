"""A map of a step over many items, as a run owns it: RESILIENCE "Batches", with the owner killed at every event."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.chunks import chunk_position, divide, parse_position, uncovered
from pyworkflow_ray.engine.commands import Limits
from pyworkflow_ray.engine.events import ChunkCompleted, Event, StepHandedBack
from pyworkflow_ray.engine.history import History
from pyworkflow_ray.testing.simulator import START_AT
from tests.unit.engine.crashing import CrashingRun, World, crash_everywhere

EXECUTED: Counter[int] = Counter()
KEYS: dict[int, set[str]] = {}


@pw.step(max_retries=2, retry_delay=3, max_recoveries=3)
def work(n: int) -> int:
    EXECUTED[n] += 1
    KEYS.setdefault(n, set()).add(pw.current_step().idempotency_key)
    if n % 7 == 0:
        raise ConnectionError(f"no {n}")
    if n % 10 == 5:
        raise ValueError("five")
    return 10 * n


@pw.step(idempotent=False)
def once(n: int) -> int:
    EXECUTED[n] += 1
    return n


@pw.step
def refuse(n: int) -> int:
    EXECUTED[n] += 1
    raise ValueError(f"no {n}")


@pw.step
def add(n: int) -> int:
    return n + 1


STEPS = (work, once, refuse, add)


@pytest.fixture(autouse=True)
def _ledger() -> None:
    EXECUTED.clear()
    KEYS.clear()


def world(**given: Any) -> World:
    return World(STEPS, **{"wait_max_s": 60.0, **given})


def shown(batch: Any) -> list[Any]:
    return [repr(r) if isinstance(r, Exception) else r for r in batch.results]


def right(n: int) -> Any:
    return f"ConnectionError('no {n}')" if n % 7 == 0 else "ValueError('five')" if n % 10 == 5 else 10 * n


def chunks_of(run: CrashingRun) -> list[ChunkCompleted]:
    return [e for e in run.events if isinstance(e, ChunkCompleted)]


async def thirty() -> list[Any]:
    batch = await work.map(range(30), concurrency=3, chunk_size=4)
    return [shown(batch), len(batch.succeeded), batch.by_type, batch.retried]


def test_results_are_in_input_order_whatever_order_they_end_in_and_errors_in_their_place() -> None:
    expected = [[right(n) for n in range(30)], 22, {"ConnectionError": 5, "ValueError": 3}, {"ConnectionError": 10}]
    for seed in range(10):
        run = CrashingRun(thirty, world(seed=seed)).run()
        assert run.ending() == ("completed", repr(expected))
    assert run.types().count("chunk_completed") == 8


def test_the_journal_has_one_event_a_chunk() -> None:
    async def flow() -> int:
        return len((await add.map(range(1000), chunk_size=100)).succeeded)

    run = CrashingRun(flow, world()).run()
    assert run.types() == ["run_created", "run_activated", "map_scheduled", *["chunk_completed"] * 10, "run_completed"]


def test_after_a_crash_at_every_event_the_results_are_the_same_and_finished_chunks_are_not_executed_again() -> None:
    calm, crashed = crash_everywhere(thirty, world)
    assert len(crashed) == 10
    for run in crashed:
        finished = [c.position for c in chunks_of(run)]
        executed = Counter(position for _, position, _ in run.executed)
        assert len(finished) == 8
        assert sum(executed.values()) <= 8 + 3  # those that ran when the owner died, once more
    assert calm.most_waiting <= 3


@pytest.mark.parametrize("seed", range(40))
def test_random_orders_losses_and_crashes_change_no_result(seed: int) -> None:
    async def flow() -> list[Any]:
        first = await work.map(range(1, 24), concurrency=2, chunk_size=5)
        second = await add.map((n for n in first.succeeded), concurrency=3, chunk_size=3)
        return [shown(first), shown(second), await add(len(second))]

    calm = CrashingRun(flow, world()).run()
    lost: set[tuple[str, int]] = set()

    def lose(call: Any) -> bool:
        place = parse_position(call.position)
        new = place is not None and (place[0], place[1] // 5) not in lost and call.dispatch == 1 and seed % 3 > 0
        if new and place is not None:
            lost.add((place[0], place[1] // 5))
        return new

    run = CrashingRun(flow, world(seed=seed, crash=0.1, lose=lose, wait_max_s=60.0 * (seed % 2))).run()
    assert run.ending() == calm.ending()
    covered = Counter((c.position, n) for c in chunks_of(run) for n in range(c.first, c.first + c.count))
    covered.subtract((c.position, item.index) for c in chunks_of(run) for item in c.waiting)
    assert set(covered.values()) == {1}, "an item is recorded twice"


def test_items_that_wait_long_for_a_retry_keep_no_worker_and_hold_no_other_chunk_up() -> None:
    calm, crashed = crash_everywhere(thirty, lambda: world(wait_max_s=0.0))
    kept = CrashingRun(thirty, world()).run()
    assert calm.ending() == kept.ending()
    assert "run_parked" in calm.types()
    whole = [c for c in chunks_of(calm) if c.count > 1]
    late = [c for c in chunks_of(calm) if c.count == 1]
    assert max(c.seq for c in whole) < min(c.seq for c in late)
    assert [item.attempt for c in whole for item in c.waiting] == [1] * 5
    assert len(late) == 5 * 2
    assert late[-1].ended_at - whole[-1].ended_at < 7  # two waits of 3 s, all items' at once
    assert len(crashed) > 30
    assert all(len(keys) == 1 for keys in KEYS.values())


def test_an_item_that_waits_long_sees_its_earlier_failures_and_its_fences_grow() -> None:
    seen: list[Any] = []

    @pw.step(max_retries=3, retry_delay=60)
    def once_more(n: int) -> int:
        step = pw.current_step()
        seen.append((n, step.attempt, [p.message for p in step.previous], step.fence))
        if n == 1 and step.attempt < 4:
            raise ConnectionError(f"failure {step.attempt}")
        return n

    async def flow() -> list[int]:
        return (await once_more.map(range(3), chunk_size=3)).succeeded

    lost: list[int] = []

    def lose(call: Any) -> bool:
        if call.chunk is None or call.chunk.count > 1 or lost:
            return False
        lost.append(call.dispatch)
        return True

    run = CrashingRun(flow, World((once_more,), lose=lose, limits=Limits(park_after_s=1e9))).run()
    assert lost
    assert run.ending() == ("completed", "[0, 1, 2]")
    ones = [entry for entry in seen if entry[0] == 1]
    assert [(attempt, previous) for _, attempt, previous, _ in ones] == [
        (1, []),
        (2, ["failure 1"]),
        (3, ["failure 1", "failure 2"]),
        (4, ["failure 1", "failure 2", "failure 3"]),
    ]
    fences = [fence for *_, fence in ones]
    assert fences == sorted(set(fences))


def test_the_total_timeout_of_an_item_counts_from_its_own_first_attempt_over_all_waits() -> None:
    @pw.step(max_retries=None, retry_delay=60, total_timeout=150)
    def never(n: int) -> int:
        EXECUTED[n] += 1
        raise ConnectionError(f"no {n}")

    async def flow() -> dict[str, int]:
        return (await never.map(range(6), chunk_size=2, concurrency=1)).by_type

    for wait_max_s in (0.0, 1e9):
        EXECUTED.clear()
        run = CrashingRun(flow, World((never,), wait_max_s=wait_max_s)).run()
        assert run.ending() == ("completed", repr({"ConnectionError": 6}))
        assert set(EXECUTED.values()) == {3}  # at 0, 60 and 120 s


def test_a_lost_worker_loses_only_its_unfinished_chunk() -> None:
    async def flow() -> list[Any]:
        return shown(await add.map(range(20), concurrency=2, chunk_size=5))

    run = CrashingRun(flow, world(lose=lambda call: call.position == "1[5:10]" and call.dispatch == 1)).run()
    assert run.ending() == ("completed", repr(list(range(1, 21))))
    places = [parse_position(position) for _, position, _ in run.executed]
    executed = Counter(n for place in places if place for n in range(place[1], place[1] + place[2]))
    assert {n for n, times in executed.items() if times > 1} == {5, 6, 7, 8, 9}


def test_an_item_that_kills_its_worker_ends_alone_and_no_other_is_executed_too_often() -> None:
    async def flow() -> list[Any]:
        batch = await add.map(range(1000), concurrency=2, chunk_size=500)
        return [len(batch.succeeded), [(index, type(error).__name__) for index, error in batch.failed]]

    def lose(call: Any) -> bool:
        return call.chunk is not None and call.chunk.first <= 77 < call.chunk.first + call.chunk.count

    run = CrashingRun(flow, world(lose=lose)).run()
    assert run.ending() == ("completed", "[999, [(77, 'StepLostError')]]")
    places = [parse_position(position) for _, position, _ in run.executed]
    executed = Counter(n for place in places if place for n in range(place[1], place[1] + place[2]))
    assert max(executed.values()) <= 4  # the first, and max_recoveries
    fences: dict[str, list[int]] = {}
    for _, position, dispatch in run.executed:
        fences.setdefault(position, []).append(dispatch)
    assert all(numbers == sorted(set(numbers)) for numbers in fences.values())


def test_parts_of_a_lost_chunk_have_greater_fences_than_the_whole() -> None:
    async def flow() -> int:
        return len(await add.map(range(8), concurrency=1, chunk_size=8))

    run = CrashingRun(flow, world(lose=lambda call: call.dispatch == 1)).run()
    assert [d for _, p, d in run.executed if p != "1[0:8]"] == [2] * (len(run.executed) - 1)


def test_a_step_that_is_not_idempotent_is_never_repeated_and_its_neighbours_are_safe() -> None:
    async def flow() -> list[Any]:
        batch = await once.map(range(6), concurrency=2)
        return [[type(r).__name__ for r in batch.results], batch.by_type]

    calm = CrashingRun(flow, world(lose=lambda call: call.position == "1[2:3]")).run()
    kinds = ["int", "int", "StepLostError", "int", "int", "int"]
    assert calm.ending() == ("completed", repr([kinds, {"StepLostError": 1}]))
    for number in range(2, len(calm.events)):
        EXECUTED.clear()
        run = CrashingRun(flow, world(crash_after=number)).run()
        assert max(EXECUTED.values()) == 1
        assert len(EXECUTED) >= 4, f"more than what ran when the owner died is lost (event {number})"
        assert sum(len(c.failures) for c in chunks_of(run)) <= 2


def test_an_endless_iterable_is_drawn_lazily_and_memory_is_bounded_by_concurrency_times_chunk() -> None:
    drawn: list[int] = []

    async def flow() -> list[Any]:
        ended: list[int] = []

        def endless() -> Iterator[int]:
            for n in itertools.count():
                drawn.append(n)
                yield n

        batch = await work.map(endless(), concurrency=2, chunk_size=5, max_failures=3)
        ended.append(len(batch.results))
        return [ended, len(batch.failed), batch.stopped]

    run = CrashingRun(flow, world()).run()
    status, result = run.ending()
    assert status == "completed"
    assert "max_failures=3" in result
    done = sum(c.done for c in chunks_of(run))
    assert max(drawn) <= done + 2 * 5  # what is open, and one item ahead
    assert run.most_waiting <= 2


def test_too_many_failures_stop_early_cancel_what_runs_and_report_what_was_done() -> None:
    async def flow() -> list[Any]:
        batch = await refuse.map(range(1000), concurrency=3, chunk_size=10, max_failures=4)
        with pytest.raises(ExceptionGroup, match="5 of 5 items failed"):
            batch.raise_if_failed(max_failures=4)
        return [len(batch.results), len(batch.failed), batch.not_done, batch.stopped, sorted(batch.failed_items)]

    calm, crashed = crash_everywhere(flow, world)
    expected = [30, 5, list(range(5, 30)), "5 items failed (max_failures=4)", list(range(30))]
    assert calm.ending() == ("completed", repr(expected))
    assert "step_cancelled" in calm.types()
    assert len(chunks_of(calm)) == 1
    assert len(crashed) >= 3
    EXECUTED.clear()
    CrashingRun(flow, world()).run()
    assert sorted(EXECUTED) == [0, 1, 2, 3, 4]  # the worker itself stops


def test_items_that_wait_for_a_retry_end_with_their_last_error_when_the_map_stops() -> None:
    async def flow() -> list[Any]:
        batch = await work.map([7, 5, 15], chunk_size=3, max_failures=0)
        return [shown(batch)[:2], type(batch.results[2]).__name__, batch.not_done]

    expected = [[right(7), right(5)], "ItemNotDoneError", [2]]
    assert CrashingRun(flow, world()).run().ending() == ("completed", repr(expected))


def test_too_high_a_ratio_stops_early_as_soon_as_it_is_certain() -> None:
    async def flow() -> list[Any]:
        known = await refuse.map(range(100), concurrency=1, chunk_size=10, max_ratio=0.15)
        unknown = await refuse.map(iter(range(1000)), concurrency=1, chunk_size=10, max_ratio=0.5)
        return [len(known.failed), known.stopped, len(unknown.failed), unknown.stopped]

    run = CrashingRun(flow, world()).run()
    expected = [
        16,
        "16 of 100 items failed (max_ratio=0.15)",
        100,
        "100 of 100 items failed (max_ratio=0.5)",
    ]
    assert run.ending() == ("completed", repr(expected))


def test_each_item_has_an_idempotency_key_of_its_own_the_same_in_all_attempts_and_recoveries() -> None:
    run = CrashingRun(thirty, world(seed=3, crash=0.4)).run()
    assert run.crashes
    assert all(len(keys) == 1 for keys in KEYS.values())
    assert len({key for keys in KEYS.values() for key in keys}) == 30


def test_failed_items_alone_are_mapped_again_in_their_places() -> None:
    async def flow() -> list[Any]:
        batch = await work.map(range(30), chunk_size=4)
        before = EXECUTED.copy()
        again = await batch.rerun_failed()
        rerun = sorted(n for n in EXECUTED if EXECUTED[n] > before[n])
        return [shown(again) == shown(batch), rerun == [n for n in range(30) if not isinstance(right(n), int)]]

    assert CrashingRun(flow, world()).run().ending() == ("completed", "[True, True]")


def test_empty_and_short_maps_end_at_once() -> None:
    async def flow() -> list[int]:
        return [len(await add.map([])), len(await add.map(iter([]))), len(await add.map([1]))]

    run = CrashingRun(flow, world()).run()
    assert run.ending() == ("completed", "[0, 0, 1]")
    assert run.types().count("chunk_completed") == 1


def test_items_that_come_out_otherwise_on_replay_pause_the_run() -> None:
    offset = [0]

    async def flow() -> int:
        offset[0] += 1
        return len(await add.map([n + offset[0] for n in range(10)], chunk_size=5, concurrency=1))

    run = CrashingRun(flow, world(crash_after=4)).run()
    assert run.paused is not None
    assert "the code has other items" in run.paused.message  # type: ignore[attr-defined]


def test_another_chunk_size_on_replay_pauses_the_run() -> None:
    sizes = iter([5, 4])

    async def flow() -> int:
        return len(await add.map(range(20), chunk_size=next(sizes)))

    run = CrashingRun(flow, world(crash_after=4)).run()
    assert run.paused is not None
    assert "chunks of 5" in run.paused.message  # type: ignore[attr-defined]
    assert "chunks of 4" in run.paused.message  # type: ignore[attr-defined]


def test_an_iterable_that_fails_half_way_fails_the_body_and_cancels_what_runs() -> None:
    async def flow() -> None:
        def broken() -> Iterator[int]:
            yield from range(12)
            raise OSError("source is gone")

        await add.map(broken(), concurrency=2, chunk_size=5)

    calm, _ = crash_everywhere(flow, world)
    assert calm.ending()[:3] == ("failed", "OSError", "source is gone")
    assert "step_cancelled" in calm.types()


def opened(events: list[Event]) -> bool:
    return any(e.type == "map_scheduled" for e in events)


def test_a_cancelled_run_cancels_its_map() -> None:
    async def flow() -> None:
        await add.map(range(100), concurrency=3, chunk_size=2)

    calm, _ = crash_everywhere(flow, lambda: world(cancel_when=opened, never=frozenset({add.definition.name})))
    assert calm.ending()[:2] == ("cancelled", "enough")
    assert [e.position for e in calm.events if e.type == "step_cancelled"] == ["1"]  # type: ignore[attr-defined]


def test_a_map_that_nobody_waits_for_is_cancelled_at_the_end_of_its_run_and_before_it_is_undone() -> None:
    import asyncio

    async def ends() -> int:
        task = asyncio.create_task(add.map(range(100), concurrency=3, chunk_size=2))
        await once(1)
        return 1 if not task.done() else 0

    async def fails() -> None:
        pw.current_run().on_failure(once, 9)
        await ends()
        raise LookupError("no")

    for flow, ending in ((ends, "completed"), (fails, "failed")):
        run = CrashingRun(flow, world(never=frozenset({add.definition.name}))).run()
        assert run.ending()[0] == ending
        assert [e.position for e in run.events if e.type == "step_cancelled"] == ["t1.1"]  # type: ignore[attr-defined]


def test_a_chunk_of_many_has_no_total_timeout_of_its_own_and_one_of_one_has_its_items() -> None:
    async def flow() -> int:
        return len(await add.map(range(4), chunk_size=2, concurrency=2))

    run = CrashingRun(flow, world()).run()
    history = History.of(run.events[:3])
    for seq, position in enumerate(("1[0:2]", "1[2:3]"), 3):
        history.apply(StepHandedBack(seq=seq, at=START_AT, position=position, dispatch=1, due_at=START_AT + 9))
    assert [step.began_at for step in history.steps.values()] == [None, START_AT]


def test_maps_beside_steps_and_each_other_keep_their_results_apart() -> None:
    import asyncio

    async def flow() -> list[Any]:
        one, two, three = await asyncio.gather(
            add.map(range(9), chunk_size=2), work.map([1, 2, 3], chunk_size=1), add(41)
        )
        return [shown(one), shown(two), three]

    calm, crashed = crash_everywhere(flow, world)
    assert calm.ending() == ("completed", repr([list(range(1, 10)), [10, 20, 30], 42]))
    assert len(crashed) > 8


def test_an_item_or_a_value_that_can_not_be_sent_or_stored_fails_alone() -> None:
    @pw.step
    def odd(n: Any) -> Any:
        return (x for x in [n]) if n == 3 else (n, n)

    async def flow() -> list[Any]:
        batch = await odd.map([1, (x for x in [2]), 3, 4], chunk_size=4)
        return [[r if not isinstance(r, Exception) else "failed" for r in batch.results], batch.by_type]

    run = CrashingRun(flow, World((odd,))).run()
    assert run.ending() == ("completed", "[[(1, 1), 'failed', 'failed', (4, 4)], {'PayloadError': 2}]")


def test_chunks_are_divided_so_that_the_last_recovery_is_for_single_items() -> None:
    assert divide(0, 1000, 1, 3)[:2] == [(0, 100), (100, 100)]
    assert divide(100, 100, 2, 3)[1] == (110, 10)
    assert [count for _, count in divide(0, 10, 3, 3)] == [1] * 10
    for count in (1, 2, 3, 7, 999, 1000):
        parts = divide(5, count, 1, 1)
        assert [n for first, length in parts for n in range(first, first + length)] == list(range(5, 5 + count))
    assert parse_position(chunk_position("t2.1", 5, 10)) == ("t2.1", 5, 10)
    assert parse_position("t2.1") is None
    assert uncovered(0, 10, [(2, 3), (8, 2), (30, 5)]) == [(0, 2), (5, 3)]
