"""Faults seen in another durable-workflow engine, each a case that must come out right here, by its number there."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray import RunExistsError, step, workflow
from pyworkflow_ray.engine.commands import Finish
from pyworkflow_ray.engine.driver import Driver
from pyworkflow_ray.engine.events import CodeEnvironment, CodeRef, RunActivated, RunCreated
from pyworkflow_ray.engine.history import History
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.testing.simulator import Faults, Simulator
from tests.unit.execution.calls import CODEC, error_of, execute


def test_fault_02_a_timeout_is_enforced_for_async_and_sync_steps() -> None:
    @pw.step(timeout=0.02)
    async def hangs() -> None:
        await asyncio.sleep(3_600)

    @pw.step(timeout=0.02)
    def blocks() -> None:
        time.sleep(3_600)

    for timed in (hangs, blocks):
        outcome = execute(timed)
        assert outcome.error is not None
        assert outcome.error.kind == "timeout"
        assert isinstance(error_of(outcome), pw.StepTimeoutError)
        assert isinstance(error_of(outcome), TimeoutError)


def test_fault_03_a_permanent_error_is_not_retried() -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0)
    async def rejects() -> None:
        calls.append(1)
        raise ValueError("malformed order")

    outcome = execute(rejects)
    assert (outcome.why, len(calls)) == ("permanent", 1)


def test_fault_03_except_exception_in_a_step_swallows_no_signal_of_ours() -> None:
    started = []

    @pw.step(timeout=0.02)
    def fallback_chain() -> str:
        for source in ("primary", "fallback", "offline"):
            try:
                started.append(source)
                time.sleep(3_600)
            except Exception:
                continue
        return "default"

    assert isinstance(error_of(execute(fallback_chain)), pw.StepTimeoutError)
    assert started == ["primary"]


@pytest.mark.parametrize(
    "retry_after",
    [30, 30.0, "30s", dt.timedelta(seconds=30), dt.datetime(2027, 1, 15, 8, 0, 30, tzinfo=dt.UTC)],
    ids=lambda value: type(value).__name__,
)
def test_fault_05_retry_after_takes_every_form(retry_after: Any) -> None:
    @pw.step(max_retries=1, retry_delay=1)
    def busy() -> None:
        raise pw.RetryableError("busy", retry_after=retry_after)

    now = dt.datetime(2027, 1, 15, 8, 0, 0, tzinfo=dt.UTC).timestamp()
    outcome = execute(busy, clock=lambda: now)
    assert (outcome.status, outcome.retry_at) == ("handed_back", now + 30)
    assert outcome.attempts[0].delay_reason == "retry_after"


def test_fault_10_a_cancellation_inside_a_step_is_not_retried() -> None:
    calls = []

    @pw.step(max_retries=5, retry_delay=0, retry_on=BaseException)
    async def cancels() -> None:
        calls.append(1)
        raise asyncio.CancelledError("by the step itself")

    assert execute(cancels).status == "failed"
    assert len(calls) == 1


def test_fault_13_the_step_gets_what_was_validated() -> None:
    @pw.step
    def kind(n: int) -> str:
        return type(n).__name__

    assert kind("7") == "int"  # type: ignore[arg-type, comparison-overlap]
    args, kwargs = kind.definition.validate(("7",), {})
    outcome = execute(kind, *args, **kwargs)
    assert outcome.result is not None
    assert CODEC.decode(outcome.result) == "int"


# The engine's faults, on the driver of production with a simulated store, clock and workers ------------------------


@step(max_retries=2, retry_delay=5)
def recovers(failures: list[int]) -> str:
    raise NotImplementedError("simulated")


@step
def echo(value: object) -> object:
    return value


def _simulate(flow: Any, *args: Any, **steps: Any) -> Any:
    functions = {echo.definition.name: echo.fn}
    functions.update({name: fn for name, fn in steps.items() if not name.startswith("_")})
    functions[recovers.definition.name] = steps.get("_recovers", recovers.fn)
    return Simulator(flow, functions, args=args, seed=1).run()


def test_fault_01_a_steps_retry_runs_after_its_durable_delay() -> None:
    calls: list[int] = []

    def fails_once(failures: list[int]) -> str:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("once")
        return "done"

    async def flow() -> Any:
        return await recovers([])

    simulation = _simulate(flow, _recovers=fails_once)
    assert simulation.ended.result.data == "done"
    assert len(calls) == 2
    assert simulation.clock_s >= 5


def test_fault_04_a_sleep_wakes_by_itself_and_never_early() -> None:
    async def flow() -> Any:
        await asyncio.gather(asyncio.sleep(100), echo(1), asyncio.sleep(3))  # wakes for others meanwhile
        return "woke"

    simulation = _simulate(flow)
    due = {e.position: e.due_at for e in simulation.events if e.type == "timer_started"}
    fired = {e.position: e.at for e in simulation.events if e.type == "timer_fired"}
    assert simulation.ended.result.data == "woke"
    assert fired.keys() == due.keys()
    assert all(fired[position] >= due[position] for position in due)


def test_fault_06_event_numbers_never_collide_under_concurrency() -> None:
    async def flow() -> Any:
        return await asyncio.gather(*(echo(n) for n in range(20)))

    events = _simulate(flow).events
    assert [e.seq for e in events] == list(range(len(events)))
    assert len({e.position for e in events if e.type == "step_completed"}) == 20


def test_fault_07_concurrent_creations_of_one_id_make_one_run(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)

    def create(number: int) -> bool:
        try:
            storage.create_run(_created(storage, "order-42"))
        except RunExistsError:
            return False
        return True

    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(create, range(5))) == 1
    assert list(storage.list_run_ids()) == ["order-42"]


def test_fault_08_a_completed_run_that_is_taken_up_again_executes_and_records_nothing() -> None:
    async def flow() -> Any:
        return await echo(1)

    events = _simulate(flow).events
    for cause in ("resume", "recovery", "wake", "cancel"):
        driver = Driver(flow, CODEC, rng=random.Random(0))
        driver.activate(events, RunActivated(epoch=1, cause=cause), events[-1].at + 1)  # type: ignore[arg-type]
        assert driver.effects() == [Finish(events[-1])]


def test_fault_09_an_exceptions_type_is_the_same_on_replay() -> None:
    class OutOfStock(LookupError):
        def __init__(self, *, sku: str) -> None:
            super().__init__(sku)
            self.sku = sku

    def out(failures: list[int]) -> str:
        raise OutOfStock(sku="A1")

    async def flow() -> Any:
        try:
            await recovers([])
        except OutOfStock as error:
            await asyncio.sleep(100)  # parks: what follows is reached by a replay
            return f"{type(error).__name__} {error.sku}"

    assert _simulate(flow, _recovers=out).ended.result.data == "OutOfStock A1"


def test_fault_11_two_calls_with_equal_arguments_are_two_steps() -> None:
    async def flow() -> Any:
        return [await echo(1), await echo(1)]

    simulation = _simulate(flow)
    assert len(simulation.executions) == 2
    assert len({position for position, _ in simulation.executions}) == 2


def test_fault_12_bare_decorators_and_sync_steps_work() -> None:
    @workflow
    async def flow() -> Any:
        return await echo("sync")

    assert _simulate(flow).ended.result.data == "sync"


def test_fault_14_a_step_costs_the_same_however_long_the_log_is() -> None:
    """The log is read once an activation: no event is encoded or folded again when the next step comes."""

    def folded(steps: int) -> int:
        async def flow() -> Any:
            for n in range(steps):
                await echo(n)

        counted = 0
        apply = History.apply

        def counting(self: History, event: Any) -> None:
            nonlocal counted
            counted += 1
            apply(self, event)

        History.apply = counting  # type: ignore[method-assign]
        try:
            _simulate(flow)
        finally:
            History.apply = apply  # type: ignore[method-assign]
        return counted

    assert folded(200) < 10.5 * folded(20)


@pytest.mark.parametrize("at_once", [False, True], ids=["one after another", "at once"])
def test_fault_14_nothing_walks_through_all_steps_when_one_ends(at_once: bool) -> None:
    """Counted in calls and resumed generators, which is what a walk in Python is made of."""

    def calls(steps: int) -> int:
        async def flow() -> Any:
            if at_once:
                return await asyncio.gather(*(echo(n) for n in range(steps)))
            for n in range(steps):
                await echo(n)

        counted = 0

        def counting(_frame: Any, kind: str, _arg: Any) -> None:
            nonlocal counted
            counted += kind == "call"

        sys.setprofile(counting)
        try:
            _simulate(flow)
        finally:
            sys.setprofile(None)
        return counted

    calls(1)  # what is made on first use
    assert calls(1_600) < 4.6 * calls(400)


def test_fault_16_a_crash_in_mid_step_is_recovered() -> None:
    async def flow() -> Any:
        return [await echo(n) for n in range(5)]

    functions = {echo.definition.name: echo.fn}
    crashed = Simulator(flow, functions, seed=4, faults=Faults(crash=0.3)).run()
    assert crashed.struck["crash"] > 0
    assert any(e.type == "step_lost" for e in crashed.events)
    assert crashed.ended.result.data == [0, 1, 2, 3, 4]


def test_fault_17_a_type_tag_in_user_data_stays_data() -> None:
    hostile = {"__type__": "pickle", "__class__": "os.system", "data": "gASVHgAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOULg=="}

    async def flow() -> Any:
        return await echo(hostile)

    assert _simulate(flow).ended.result.data == hostile


def _created(storage: Storage, run_id: str) -> RunCreated:
    return RunCreated(
        seq=0,
        run_id=run_id,
        run_uid="0" * 32,
        storage_id=storage.storage_id,
        workflow="w",
        code=CodeRef(how="import", name="w"),
        environment=CodeEnvironment(key="k", python="3.11"),
    )
