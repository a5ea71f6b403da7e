"""What an environment says of its runs, how they pause, hang and are taken up, and whose breakers they use."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.testing import DeadlockError, RunPausedError, WorkflowEnv, no_waits

payments = pw.CircuitBreaker("kit-payments", failure_threshold=2, recovery_timeout="1m")
ON = {"flag": False}


@pw.step
async def add(x: int, y: int) -> int:
    return x + y


@pw.step
async def needs_flag() -> str:
    if not ON["flag"]:
        raise ValueError("no flag")
    return "flag"


@pw.workflow
async def total(x: int, y: int = 1) -> int:
    return await add(await add(x, y), y)


@pw.workflow
async def flagged() -> str:
    return await needs_flag()


# Running ----------------------------------------------------------------------------------------------------------


async def test_run_gives_the_result_and_the_run_can_be_looked_at(workflow_env):
    assert await workflow_env.run(total, 1) == 3
    assert [e.type for e in workflow_env.events()][-1] == "run_completed"
    assert [e.seq for e in workflow_env.events()] == list(range(len(workflow_env.events())))
    assert [s.name for s in workflow_env.steps()] == ["add", "add"]
    assert workflow_env.explain().verdict == "completed"
    assert workflow_env.get_run().status() == "completed"


def test_a_sync_test_runs_them_too(workflow_env):
    assert workflow_env.run_sync(total, 1, y=2) == 5
    assert asyncio.run(workflow_env.run(total, 2)) == 4


async def test_runs_started_together_go_on_together(workflow_env):
    @pw.workflow
    async def sleeper(s: float) -> float:
        await asyncio.sleep(s)
        return s

    began = workflow_env.now()
    results = await asyncio.gather(workflow_env.run(sleeper, 50), workflow_env.run(sleeper, 100))
    assert results == [50, 100]
    assert (workflow_env.now() - began).total_seconds() == 100


async def test_a_run_id_means_one_run(workflow_env):
    flow = total.options(run_id="order-1", attributes={"who": "me"})
    assert await workflow_env.run(flow, 1) == 3
    assert await workflow_env.run(flow, 1, y=1) == 3
    assert len(workflow_env.list_runs()) == 1
    assert workflow_env.get_run("order-1").explain().attributes == {"who": "me"}
    with pytest.raises(pw.RunExistsError, match="argument 1 is another"):
        await workflow_env.run(flow, 2)
    with pytest.raises(pw.RunNotFoundError, match="runs: order-1"):
        workflow_env.get_run("order-2")


async def test_arguments_are_checked_as_by_start(workflow_env):
    with pytest.raises(TypeError):
        await workflow_env.run(total)
    with pytest.raises(ValueError, match="int"):
        await workflow_env.run(total, "one")
    with pytest.raises(TypeError, match="runs workflows"):
        await workflow_env.run(add, 1, 2)


async def test_a_handle_cancels_and_the_result_says_so(workflow_env):
    @pw.workflow
    async def waits() -> None:
        await asyncio.sleep(3600)

    handle = workflow_env.start(waits)
    await workflow_env.advance(10)
    handle.cancel("changed my mind")
    with pytest.raises(pw.RunCancelledError, match="changed my mind"):
        await handle
    assert handle.status() == "cancelled"


async def test_a_failed_run_resumes_from_its_failed_step(workflow_env):
    ON["flag"] = False
    with pytest.raises(ValueError, match="no flag"):
        await workflow_env.run(flagged)
    ON["flag"] = True
    assert await workflow_env.get_run().resume() == "flag"


async def test_a_retry_that_is_far_away_is_woken(workflow_env):
    @pw.step(max_retries=1, retry_delay="1d")
    async def far() -> int:
        return pw.current_step().attempt

    @pw.workflow
    async def flow() -> int:
        return await far()

    workflow_env.fail(far)
    began = workflow_env.now()
    handle = workflow_env.start(flow)
    await workflow_env.advance(60)
    handle.wake()
    assert await handle == 2
    assert (workflow_env.now() - began).total_seconds() == 60


async def test_a_run_is_paused_by_hand_and_goes_on(workflow_env):
    @pw.workflow
    async def waits() -> int:
        await asyncio.sleep(3600)
        return 1

    handle = workflow_env.start(waits)
    await workflow_env.advance(60)
    handle.pause()
    with pytest.raises(RunPausedError, match="paused by hand") as caught:
        await handle
    assert (caught.value.reason, handle.status()) == ("user", "paused")
    assert await handle.resume() == 1


async def test_a_step_that_used_up_its_attempts_pauses_its_run(workflow_env):
    @pw.step(max_retries=1, retry_delay=1, on_exhausted="pause")
    async def works() -> int:
        return pw.current_step().attempt

    @pw.workflow
    async def flow() -> int:
        return await works()

    workflow_env.fail(works, times=3)
    with pytest.raises(RunPausedError, match="used up its attempts"):
        await workflow_env.run(flow)
    assert await workflow_env.get_run().resume() == 4


async def test_a_map_runs_its_items_and_survives_every_crash(workflow_env):
    @pw.step
    async def square(x: int) -> int:
        await asyncio.sleep(x)
        if x == 3:
            raise ValueError(x)
        return x * x

    @pw.workflow
    async def flow() -> list:
        batch = await square.map(range(6), chunk_size=2, concurrency=2)
        return [len(batch.succeeded), [str(r) for r in batch.results]]

    assert await workflow_env.crash_everywhere(flow) == [5, ["0", "1", "4", "3", "16", "25"]]


async def test_result_waits_in_virtual_time(workflow_env):
    @pw.workflow
    async def waits() -> int:
        await asyncio.sleep(3600)
        return 1

    handle = workflow_env.start(waits)
    with pytest.raises(TimeoutError):
        handle.result(timeout=60)
    assert handle.result(timeout="2h") == 1
    assert handle.exception() is None


# What goes wrong --------------------------------------------------------------------------------------------------


async def test_a_deadlock_names_the_step_and_the_line_that_waits(workflow_env):
    @pw.step
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    @pw.workflow
    async def flow() -> None:
        await waits_for_ever()

    with pytest.raises(
        DeadlockError, match=r"nothing is due and nothing runs.*test_environment.py:\d+ in waits_for_ever"
    ):
        await workflow_env.run(flow)


async def test_a_workflow_that_waits_for_nothing_is_paused_and_says_so(workflow_env):
    @pw.workflow
    async def flow() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RunPausedError, match="no step and no timer will ever bring") as caught:
        await workflow_env.run(flow)
    assert caught.value.reason == "code"


async def test_a_workflow_that_loops_for_ever_is_paused():
    @pw.workflow
    async def flow() -> None:
        while True:
            await asyncio.sleep(1)

    async with WorkflowEnv(max_events=200) as env:
        with pytest.raises(RunPausedError, match="max_events=200"):
            await env.run(flow)


async def test_code_that_changed_is_found_by_the_recovery_after_a_crash(workflow_env):
    turns = []

    @pw.workflow
    async def flow() -> int:
        turns.append(1)
        return await (add(1, 1) if len(turns) == 1 else needs_flag())

    workflow_env.crash_after(4)
    with pytest.raises(
        pw.NonDeterminismError, match=r"position 1: its history has step .*add.*the code has step .*flag"
    ):
        await workflow_env.run(flow)


async def test_an_environment_inside_a_step_or_workflow_is_refused(workflow_env):
    @pw.step
    async def inner() -> int:
        return await workflow_env.run(total, 1)

    @pw.workflow
    async def flow() -> int:
        return await inner()

    with pytest.raises(pw.ConfigurationError, match="not inside a workflow or a step"):
        await workflow_env.run(flow)


async def test_an_environment_that_is_not_entered_or_has_ended_says_so():
    env = WorkflowEnv()
    with pytest.raises(pw.ConfigurationError, match="not entered"):
        await env.run(total, 1)
    with env:
        pass
    with pytest.raises(pw.ConfigurationError, match="has ended"):
        await env.run(total, 1)


async def test_a_handle_can_be_read_after_its_environment(recwarn):
    async with WorkflowEnv() as env:
        await env.run(total, 1)
        handle = env.get_run()
    assert handle.explain().verdict == "completed"
    assert handle.result() == 3


async def test_what_a_step_leaves_running_and_does_not_stop_ends_with_the_environment():
    ended = []

    @pw.step(timeout=1)
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                ended.append(1)
                if len(ended) > 3:
                    raise

    @pw.workflow
    async def flow() -> None:
        await stubborn()

    async with WorkflowEnv() as env:
        with pytest.raises(pw.StepTimeoutError):
            await env.run(flow)


# Replay -----------------------------------------------------------------------------------------------------------


async def test_replay_follows_events_handles_and_files_and_executes_nothing(workflow_env, tmp_path):
    await workflow_env.run(total, 1)
    before = workflow_env.events()
    workflow_env.replay(before)
    workflow_env.replay(workflow_env.get_run())
    file = tmp_path / "history.json"
    file.write_text(json.dumps([event.model_dump(mode="json") for event in before]))
    workflow_env.replay(file)
    file.write_text("\n".join(event.model_dump_json() for event in before))
    workflow_env.replay(str(file), flow=total)
    assert workflow_env.events() == before


async def test_replay_of_changed_code_names_the_place(workflow_env):
    await workflow_env.run(total, 1)

    @pw.workflow
    async def changed(x: int, y: int = 1) -> int:
        await pw.sleep(1)
        return await add(x, y)

    with pytest.raises(
        pw.NonDeterminismError, match=r"position 1: its history has step .*, the code has a timer of 1 s"
    ):
        workflow_env.replay(workflow_env.events(), flow=changed)


def test_replay_of_what_is_no_history_says_so(workflow_env, tmp_path):
    with pytest.raises(pw.ConfigurationError, match="it is empty"):
        workflow_env.replay([])
    (tmp_path / "x").write_text("no json")
    with pytest.raises(pw.ConfigurationError, match="holds no JSON"):
        workflow_env.replay(tmp_path / "x")


# Breakers ---------------------------------------------------------------------------------------------------------


@pw.step(breaker=payments)
async def pays(ok: bool) -> str:
    if not ok:
        raise ConnectionError("down")
    return "paid"


@pw.step
async def pays_by_hand(ok: bool) -> str:
    async with payments:
        if not ok:
            raise ConnectionError("down")
    return "paid"


@pw.workflow
async def through_an_outage(by_hand: bool) -> list[str]:
    pay = pays_by_hand if by_hand else pays
    seen = []
    for ok in (False, False, True):
        try:
            seen.append(await pay(ok))
        except (ConnectionError, pw.CircuitOpenError) as error:
            seen.append(type(error).__name__)
    await pw.sleep("1m")
    return [*seen, await pay(True)]


@pytest.mark.parametrize("by_hand", [False, True])
async def test_breakers_work_in_virtual_time(workflow_env, by_hand):
    expected = ["ConnectionError", "ConnectionError", "CircuitOpenError", "paid"]
    assert await workflow_env.run(through_an_outage, by_hand) == expected
    assert payments.state == "closed"


async def test_breakers_are_the_environments_own():
    async with WorkflowEnv() as one:
        handle = one.start(through_an_outage, False)
        await one.advance(1)
        assert payments.state == "open"
        async with WorkflowEnv():
            assert payments.state == "closed"
        assert payments.state == "open"
        await handle
    assert payments.state == "closed"


async def test_keys_and_rates_of_breakers_work_too(workflow_env):
    rated = pw.CircuitBreaker("kit-rated", failure_rate=0.5, minimum_calls=4, window="10s", recovery_timeout=30)

    @pw.step
    async def asks(host: str, ok: bool) -> str:
        async with rated.key(host):
            if not ok:
                raise ConnectionError
        return "ok"

    @pw.workflow
    async def flow() -> list[str]:
        seen = []
        for host, ok in [("a", True), ("a", False)] * 2 + [("a", True), ("b", True)]:
            try:
                seen.append(await asks(host, ok))
            except (ConnectionError, pw.CircuitOpenError) as error:
                seen.append(type(error).__name__)
        await pw.sleep(30)
        return [*seen, await asks("a", True)]

    expected = ["ok", "ConnectionError", "ok", "ConnectionError", "CircuitOpenError", "ok", "ok"]
    assert await workflow_env.run(flow) == expected
    assert rated.key("a").state == "closed"


async def test_a_step_waits_for_its_breaker_without_spending_attempts(workflow_env):
    outage = pw.CircuitBreaker("kit-outage", failure_threshold=1, recovery_timeout="1h")
    down = [1]

    @pw.step(breaker=outage)
    async def finds_it_down() -> None:
        raise ConnectionError("down")

    @pw.step(breaker=outage, on_open="wait")
    async def waits() -> int:
        assert not down
        return pw.current_step().attempt

    @pw.workflow
    async def flow() -> int:
        with pytest.raises(ConnectionError):
            await finds_it_down()
        return await waits()

    began = workflow_env.now()
    handle = workflow_env.start(flow)
    await workflow_env.advance("30m")
    assert handle.status() == "parked"
    down.clear()
    assert await handle == 1
    assert 3600 <= (workflow_env.now() - began).total_seconds() < 4000


async def test_retry_budgets_are_the_environments_own():
    budget = pw.RetryBudget("kit-budget", tokens=20, retry_cost=14)

    @pw.step(max_retries=3, retry_delay=0, retry_budget=budget)
    async def fails() -> None:
        raise ConnectionError("down")

    @pw.workflow
    async def flow() -> None:
        await fails()

    for _ in range(2):  # a bucket that was shared would be empty the second time
        async with WorkflowEnv() as env:
            with pytest.raises(pw.RetryBudgetExhausted):
                await env.run(flow)
            assert env.explain().retries == 1


async def test_hooks_are_told_of_retries_and_failed_runs(workflow_env, monkeypatch):
    from pyworkflow_ray.execution import hooks

    monkeypatch.setattr(hooks, "_own", {"retry": [], "run_failed": [], "breaker_open": []})
    seen = []
    pw.on_retry(lambda event: seen.append(("retry", event.attempt)))
    pw.on_run_failed(lambda event: seen.append(("failed", event.run_id)))

    @pw.step(max_retries=1, retry_delay=0)
    async def fails() -> None:
        raise ConnectionError("down")

    @pw.workflow
    async def flow() -> None:
        await fails()

    with pytest.raises(ConnectionError):
        await workflow_env.run(flow)
    assert seen == [("retry", 1), ("failed", "run-1")]


# no_waits and the plugin --------------------------------------------------------------------------------------------


def test_no_waits_removes_the_waits_of_plain_calls():
    @pw.step(max_retries=3, retry_delay="1h")
    def fails(tries: Any) -> None:
        tries.append(1)
        pw.sleep("1h")
        raise ConnectionError

    with no_waits():
        tries: list[int] = []
        with pytest.raises(ConnectionError):
            fails.options(max_retries=1)(tries)
        assert len(tries) == 2


async def test_no_waits_removes_them_from_async_calls_too():
    count = []

    @pw.step(max_retries=2, retry_delay="1h")
    async def fails() -> int:
        count.append(1)
        await pw.sleep("1h")
        if len(count) < 3:
            raise ConnectionError
        return len(count)

    with no_waits():
        assert await fails() == 3


def test_the_plugin_brings_the_fixture_and_loads_nothing_by_itself(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text(
        textwrap.dedent("""
        import sys
        import pyworkflow_ray.testing
        def test_nothing_is_loaded():
            assert not {"ray", "duckdb", "pyarrow", "pydantic"} & set(sys.modules)
        def test_sync(workflow_env):
            import pyworkflow_ray as pw
            @pw.workflow
            async def flow() -> int:
                await pw.sleep("1d")
                return 1
            assert workflow_env.run_sync(flow) == 1
            assert "ray" not in sys.modules
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", str(test)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
