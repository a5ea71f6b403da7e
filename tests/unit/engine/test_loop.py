"""Bodies on the private loop: what asyncio offers works, what can't be replayed is refused."""

from __future__ import annotations

import asyncio
import logging

import pytest

from pyworkflow_ray.engine.events import RunCompleted, RunFailed
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.step import step
from pyworkflow_ray.testing.simulator import Faults, Simulator


@step(max_recoveries=1000)
def double(n: int) -> int:
    return 2 * n


@step
def refuse(n: int) -> int:
    raise LookupError(f"no {n}")


STEPS = {double.definition.name: double.fn, refuse.definition.name: refuse.fn}


def simulate(flow, *args, seed=1, **options):
    return Simulator(flow, STEPS, args=args, seed=seed, **options).run()


def result_of(flow, *args, **options):
    ended = simulate(flow, *args, **options).ended
    assert isinstance(ended, RunCompleted), ended
    return ended.result.data


def test_gather_keeps_the_order_of_its_arguments():
    async def flow():
        return await asyncio.gather(*(double(n) for n in range(5)))

    assert result_of(flow) == [0, 2, 4, 6, 8]


def test_a_sleep_of_a_day_is_a_durable_timer_and_parks_the_run():
    async def flow():
        await asyncio.sleep(86_400)
        return await double(1)

    simulation = simulate(flow)
    types = [e.type for e in simulation.events]
    assert simulation.clock_s >= 86_400
    assert "run_parked" in types
    assert "timer_fired" in types


def test_a_timeout_cancels_the_step_it_waits_for():
    async def flow():
        try:
            async with asyncio.timeout(1e-6):
                await double(1)
        except TimeoutError:
            return "late"

    simulation = simulate(flow)
    assert simulation.ended.result.data == "late"
    assert [e.position for e in simulation.events if e.type == "step_cancelled"] == ["2"]


def test_a_task_group_cancels_the_siblings_of_a_failure():
    async def flow():
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(refuse(1))
                group.create_task(asyncio.sleep(1000))
        except* LookupError as errors:
            seen = str(errors.exceptions[0])
        return seen

    simulation = simulate(flow)
    assert "no 1" in simulation.ended.result.data
    assert any(e.type == "timer_cancelled" for e in simulation.events)


def test_locks_events_and_queues_work_between_tasks():
    async def flow():
        lock, seen, ready = asyncio.Lock(), [], asyncio.Event()

        async def worker(n):
            await ready.wait()
            async with lock:
                seen.append(await double(n))

        tasks = [asyncio.create_task(worker(n)) for n in range(3)]
        ready.set()
        await asyncio.gather(*tasks)
        return seen

    assert result_of(flow) == [0, 2, 4]


def test_except_exception_in_a_body_sees_failures_only():
    async def flow():
        try:
            await refuse(1)
        except Exception as error:
            return type(error).__name__

    for seed in range(20):
        assert result_of(flow, seed=seed, faults=Faults(crash=0.2)) == "LookupError"


def test_an_uncaught_failure_names_the_step_it_came_from():
    async def flow():
        await double(1)
        await refuse(7)

    ended = simulate(flow).ended
    assert isinstance(ended, RunFailed)
    assert (ended.error.type, ended.position) == ("LookupError", "2")


def test_time_randomness_and_uuids_are_the_same_after_every_crash():
    async def flow():
        run = current_workflow()
        first = [run.random(), str(run.uuid4())]
        await double(1)
        await asyncio.gather(double(2), double(3))
        return [*first, run.random(), str(run.uuid4())]

    assert len({str(result_of(flow, seed=s, faults=Faults(crash=0.2))) for s in range(15)}) == 1
    value = result_of(flow)
    assert 0 <= value[0] < 1
    assert value[0] != value[2]
    assert value[1] != value[3]
    assert value[1][14] == "4"


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: asyncio.get_running_loop().run_in_executor(None, print),
        lambda: asyncio.get_running_loop().create_connection(lambda: None, "127.0.0.1", 1),
        lambda: asyncio.get_running_loop().add_reader(0, print),
    ],
    ids=["executor", "connection", "reader"],
)
def test_input_and_output_in_a_body_are_refused_with_the_remedy(attempt):
    async def flow():
        try:
            await attempt()
        except ConfigurationError as error:
            return str(error)

    assert "in a step" in result_of(flow)


def test_a_body_that_waits_for_what_nothing_will_bring_is_paused():
    async def flow():
        await asyncio.Event().wait()

    paused = simulate(flow).paused
    assert paused.reason == "code"
    assert "nothing sets" in paused.message


def test_an_evicted_body_runs_its_finally_without_effect():
    effects = []

    async def flow():
        try:
            await asyncio.sleep(1000)
            await double(1)
        finally:
            effects.append(current_workflow().evicted)
            await double(2)
        return "done"

    simulation = simulate(flow)
    assert simulation.ended.result.data == "done"
    assert effects[0] is True
    assert effects[-1] is False
    assert sum(e.type == "step_scheduled" for e in simulation.events) == 2


def test_a_log_line_of_the_body_appears_once_whatever_is_replayed(caplog):
    log = logging.getLogger("a.users.own.logger")

    async def flow():
        for n in range(3):
            log.warning("line %d", n)
            await double(n)
            await asyncio.sleep(1000)

    with caplog.at_level(logging.WARNING):
        simulate(flow)
    assert [r.getMessage() for r in caplog.records] == ["line 0", "line 1", "line 2"]


def test_a_run_is_cancelled_and_its_finally_may_await_steps():
    async def flow():
        try:
            await asyncio.sleep(1000)
        finally:
            await double(4)

    simulation = simulate(flow, cancel_at=0.5)
    assert simulation.ended.type == "run_cancelled"
    assert [e.type for e in simulation.events].count("step_completed") == 1


def test_a_body_that_ignores_its_cancellation_is_ended_after_the_grace():
    async def flow():
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                pass

    simulation = simulate(flow, cancel_at=0.5)
    assert simulation.ended.type == "run_cancelled"
    assert 10 <= simulation.clock_s < 12


def test_max_duration_ends_the_run_as_failed_with_a_timeout():
    async def flow():
        await asyncio.sleep(1000)

    simulation = simulate(flow, max_duration_s=60)
    assert isinstance(simulation.ended, RunFailed)
    assert simulation.ended.error.kind == "timeout"
    assert 60 <= simulation.clock_s < 62


def test_it_runs_inside_another_loops_task():
    async def flow():
        return await double(2)

    async def outside():
        task = asyncio.current_task()
        value = result_of(flow)
        assert asyncio.current_task() is task
        return value

    assert asyncio.run(outside()) == 4
