"""Failures and crashes on request: what strikes, how often, and what a crash changes (nothing)."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.testing import WorkflowEnv

EXECUTED: Counter[str] = Counter()


@pw.step(max_retries=3, retry_delay="10s")
def charge(order: str) -> str:
    EXECUTED["charge"] += 1
    return f"{order} charged"


@pw.step
async def ship(order: str) -> str:
    EXECUTED["ship"] += 1
    return f"{order} shipped"


@pw.step(idempotent=False)
async def only_once(order: str) -> str:
    return order


@pw.workflow
async def checkout(order: str) -> list[str]:
    charged = await charge(order)
    await pw.sleep("1h")
    return [charged, *await asyncio.gather(ship(order), ship(order + "'"))]


@pytest.fixture(autouse=True)
def fresh():
    EXECUTED.clear()


DONE = ["o charged", "o shipped", "o' shipped"]


# fail -------------------------------------------------------------------------------------------------------------


async def test_fail_fails_so_many_attempts_with_the_error_given(workflow_env):
    workflow_env.fail(charge, times=2, error=TimeoutError("no answer"))
    assert await workflow_env.run(checkout, "o") == DONE
    [step] = [s for s in workflow_env.steps() if s.name.endswith("charge")]
    assert step.attempts[0].error.message == "no answer"
    assert len(step.attempts) == 3
    assert EXECUTED["charge"] == 1


async def test_fail_beyond_the_retries_fails_the_run_with_that_very_type(workflow_env):
    class Declined(Exception):
        pass

    workflow_env.fail(charge, times=None, error=Declined)
    with pytest.raises(Declined, match="injected failure of step") as caught:
        await workflow_env.run(checkout, "o")
    assert sum(note.startswith("attempt") for note in caught.value.__notes__) == 4
    assert EXECUTED["charge"] == 0


async def test_fail_by_default_is_one_transient_failure(workflow_env):
    workflow_env.fail(charge)
    assert await workflow_env.run(checkout, "o") == DONE
    assert workflow_env.explain().retries == 1
    assert "injected failure of step" in str(workflow_env.events())


async def test_failures_asked_for_twice_come_one_after_the_other(workflow_env):
    workflow_env.fail(charge, error=ConnectionError("first"))
    workflow_env.fail(charge, error=ConnectionError("second"))
    await workflow_env.run(checkout, "o")
    failed = [e.error.message for e in workflow_env.events() if e.type == "attempt_failed"]
    assert failed == ["first", "second"]


async def test_fail_takes_a_name_and_names_the_nearest_of_one_that_is_unknown(workflow_env):
    workflow_env.fail("only_once", error=ValueError)
    with pytest.raises(pw.ConfigurationError, match="did you mean 'only_once'"):
        workflow_env.fail("only_onec")
    with pytest.raises(pw.ConfigurationError, match="no step is called 'zzzzzz'"):
        workflow_env.fail("zzzzzz")


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (charge.fn, {}, "Give the object that @step made"),
        (checkout, {}, "is no step"),
        (charge, {"times": 0}, "times=0"),
        (charge, {"error": "boom"}, "error='boom'"),
    ],
)
def test_fail_says_what_is_wrong_with_its_arguments(workflow_env, step, options, message):
    with pytest.raises(pw.ConfigurationError, match=message):
        workflow_env.fail(step, **options)


# crash_after ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
async def test_a_crash_is_recovered_inside_run(workflow_env, n):
    workflow_env.crash_after(n)
    assert await workflow_env.run(checkout, "o") == DONE
    assert workflow_env.get_run().crashes == 1
    assert EXECUTED["charge"] <= 2
    causes = [e.cause for e in workflow_env.events() if e.type == "run_activated"]
    assert "recovery" in causes


async def test_only_the_next_run_crashes(workflow_env):
    workflow_env.crash_after(3)
    await workflow_env.run(checkout, "o")
    await workflow_env.run(checkout, "o")
    assert [handle.crashes for handle in workflow_env.list_runs()] == [0, 1]


async def test_a_crash_takes_a_running_step_with_it_and_it_is_executed_again(workflow_env):
    begun = []

    @pw.step
    async def slow() -> int:
        begun.append(pw.current_step().fence)
        await asyncio.sleep(60)
        return len(begun)

    @pw.workflow
    async def flow() -> int:
        return await slow()

    workflow_env.crash_after(4)  # step_started, written while it runs
    assert await workflow_env.run(flow) == 2
    assert workflow_env.events()[3].type == "step_started"
    assert begun[0] < begun[1]
    assert "step_lost" in [e.type for e in workflow_env.events()]


async def test_a_step_that_is_not_idempotent_is_lost_by_a_crash(workflow_env):
    @pw.step(idempotent=False)
    async def slow() -> None:
        await asyncio.sleep(60)

    @pw.workflow
    async def flow() -> None:
        await slow()

    workflow_env.crash_after(4)
    with pytest.raises(pw.StepLostError):
        await workflow_env.run(flow)


async def test_a_crash_that_could_not_strike_is_no_success(workflow_env):
    workflow_env.crash_after(1000)
    with pytest.raises(AssertionError, match=r"crash_after\(1000\) did not strike: run 'run-1' has \d+ events"):
        await workflow_env.run(checkout, "o")


@pytest.mark.parametrize("n", [0, -1, True, "3"])
def test_crash_after_wants_a_number_of_an_event(workflow_env, n):
    with pytest.raises(pw.ConfigurationError, match="crash_after"):
        workflow_env.crash_after(n)


# crash_everywhere -------------------------------------------------------------------------------------------------


async def test_crash_everywhere_crashes_after_each_event_and_gives_the_result(workflow_env, monkeypatch):
    points = []
    crash_after = WorkflowEnv.crash_after
    monkeypatch.setattr(WorkflowEnv, "crash_after", lambda self, n: (points.append(n), crash_after(self, n)))
    workflow_env.fail(charge, times=2)
    assert await workflow_env.crash_everywhere(checkout, "o") == DONE
    events = workflow_env.events()
    assert points == list(range(1, len(events) + 1))
    assert [e.type for e in events].count("attempt_failed") == 2
    assert "step_lost" not in [e.type for e in events]
    assert await workflow_env.run(checkout, "o") == DONE  # the failures are still to come
    assert workflow_env.explain().retries == 2


async def test_a_run_that_fails_must_fail_alike_after_each_crash(workflow_env):
    workflow_env.fail(charge, times=4, error=ConnectionError("gone"))
    with pytest.raises(ConnectionError, match="gone"):
        await workflow_env.crash_everywhere(checkout, "o")


async def test_a_step_that_knows_how_often_it_ran_is_found_out_with_the_event_named(workflow_env):
    ran = []

    @pw.step
    async def counts() -> int:
        ran.append(1)
        return len(ran)

    @pw.workflow
    async def flow() -> int:
        return await counts()

    message = (
        r"crash after event 1 of \d+ \(run_created\): the run completed with 2, without a crash it completed with 1"
    )
    with pytest.raises(AssertionError, match=message):
        await workflow_env.crash_everywhere(flow)


async def test_a_crash_that_takes_another_branch_is_named_by_its_event(workflow_env):
    slow = []

    @pw.step(max_retries=1, retry_delay=0)
    async def first_attempt_matters() -> str:
        return "fast" if pw.current_step().attempt == 1 else "slow"

    @pw.workflow
    async def flow() -> str:
        slow.append(await first_attempt_matters())
        return slow[-1]

    message = r"\(step_started of .*first_attempt_matters \(position 1\)\): the run completed with 'slow'"
    with pytest.raises(AssertionError, match=message):
        await workflow_env.crash_everywhere(flow)


async def test_before_run_sets_the_doubles_back_for_every_run():
    stock = {}

    @pw.step
    def take() -> int:
        stock["left"] -= 1
        return stock["left"]

    @pw.workflow
    async def flow() -> int:
        return await take()

    async with WorkflowEnv(before_run=lambda: stock.update(left=3)) as env:
        with pytest.raises(
            AssertionError, match=r"step_started .*completed with 1, without a crash it completed with 2"
        ):
            await env.crash_everywhere(flow)  # not idempotent: executed twice where the first outcome was lost
        assert await env.run(flow) == 2


async def test_a_cancelled_run_and_what_it_cleans_up_survive_every_crash(workflow_env):
    @pw.step
    async def clean() -> None:
        EXECUTED["clean"] += 1

    @pw.workflow(max_duration="1h")
    async def flow() -> None:
        try:
            await asyncio.sleep(86400)
        finally:
            await clean()

    with pytest.raises(pw.StepTimeoutError):
        await workflow_env.crash_everywhere(flow)
    assert EXECUTED["clean"] >= len(workflow_env.events()) + 1
