"""Virtual time: what takes none, what really waits, and that a step's timeout ends a sleep."""

from __future__ import annotations

import asyncio
import datetime as dt
import http.server
import threading
import time

import httpx
import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.testing import RealWaitError, WorkflowEnv

DAY = 86400


def seconds(since: dt.datetime, until: dt.datetime) -> float:
    return round((until - since).total_seconds(), 6)


@pw.step
async def waits_async(s: float) -> float:
    begun = pw.now()
    await asyncio.sleep(s)
    return seconds(begun, pw.now())


@pw.step
def waits_sync(s: float) -> float:
    begun = pw.now()
    time.sleep(s / 2)
    pw.sleep(s / 2)
    return seconds(begun, pw.now())


@pw.step(max_retries=2, retry_delay="1h")
async def fails_twice() -> float:
    if pw.current_step().attempt < 3:
        raise ConnectionError("not yet")
    return pw.current_step().previous[0].delay


@pw.workflow
async def sleeper(s: float) -> float:
    begun = pw.now()
    await pw.sleep(s / 2)
    await asyncio.sleep(s / 2)
    return seconds(begun, pw.now())


async def test_a_years_sleep_takes_a_moment_and_now_tells_of_it(workflow_env):
    began = time.perf_counter()
    assert await workflow_env.run(sleeper, 365 * DAY) == 365 * DAY
    assert time.perf_counter() - began < 5


async def test_waits_in_steps_are_virtual_in_async_and_sync_ones(workflow_env):
    @pw.workflow
    async def flow() -> list[float]:
        return [await waits_async(DAY), await waits_sync(DAY)]

    began = workflow_env.now()
    assert await workflow_env.run(flow) == [DAY, DAY]
    assert seconds(began, workflow_env.now()) == 2 * DAY


async def test_steps_side_by_side_take_as_long_as_the_longest(workflow_env):
    @pw.workflow
    async def flow() -> None:
        await asyncio.gather(waits_sync(100), waits_sync(70), waits_async(90))

    began = workflow_env.now()
    await workflow_env.run(flow)
    assert seconds(began, workflow_env.now()) == 100


async def test_what_is_due_first_comes_first_though_sync_steps_run_at_once(workflow_env):
    @pw.workflow
    async def flow() -> list[float]:
        order = []
        for done in asyncio.as_completed([waits_sync(30), waits_async(20), waits_sync(10)]):
            order.append(await done)
        return order

    assert await workflow_env.run(flow) == [10, 20, 30]


async def test_waits_between_attempts_pass_whether_kept_by_the_worker_or_handed_back(workflow_env):
    @pw.workflow
    async def flow() -> float:
        return await fails_twice()

    began = workflow_env.now()
    assert await workflow_env.run(flow) == 3600
    assert seconds(began, workflow_env.now()) == 7200
    assert [e.type for e in workflow_env.events()].count("run_parked") == 2

    @pw.workflow
    async def short() -> float:
        return await fails_twice.options(retry_delay="500ms")()

    assert await workflow_env.run(short) == 0.5
    assert "step_handed_back" not in [e.type for e in workflow_env.events()]


@pytest.mark.parametrize("which", ["async", "time.sleep", "pw.sleep", "handles it"])
async def test_a_timeout_ends_a_sleep_at_its_instant(workflow_env, which):
    after = []

    @pw.step(timeout="10s")
    async def slow_async() -> None:
        await asyncio.sleep(DAY)
        after.append("async")

    @pw.step(timeout="10s")
    def slow_sync() -> None:
        time.sleep(3)
        if which == "pw.sleep":
            pw.sleep(DAY)
        elif which == "handles it":
            try:
                time.sleep(DAY)
            except Exception:
                after.append("swallowed")
        else:
            time.sleep(DAY)
        after.append("sync")

    @pw.workflow
    async def flow() -> str:
        try:
            await (slow_async if which == "async" else slow_sync)()
        except pw.StepTimeoutError as error:
            return str(error)
        return "no timeout"

    began = workflow_env.now()
    assert "ran longer than its timeout of 10s" in await workflow_env.run(flow)
    assert seconds(began, workflow_env.now()) == 10
    assert after == []


async def test_a_sleep_as_long_as_the_timeout_is_a_timeout_and_a_shorter_one_is_none(workflow_env):
    @pw.step(timeout=5)
    def sleeps(s: float) -> float:
        time.sleep(s)
        return s

    @pw.workflow
    async def flow(s: float) -> float:
        return await sleeps(s)

    assert await workflow_env.run(flow, 4.999) == 4.999
    with pytest.raises(pw.StepTimeoutError):
        await workflow_env.run(flow, 5)


async def test_a_step_that_computes_is_timed_out_in_real_time(workflow_env):
    @pw.step(timeout=0.05)
    def computes() -> None:
        while True:
            pass

    @pw.workflow
    async def flow() -> None:
        await computes()

    with pytest.raises(pw.StepTimeoutError):
        await workflow_env.run(flow)


async def test_deadlines_of_runs_and_timeouts_in_workflows_are_virtual(workflow_env):
    @pw.workflow(max_duration="2h")
    async def too_long() -> None:
        await waits_async(DAY)

    @pw.workflow
    async def gives_up() -> str:
        try:
            async with asyncio.timeout(60):
                await waits_async(DAY)
        except TimeoutError:
            return "gave up"
        return "?"

    began = workflow_env.now()
    with pytest.raises(pw.StepTimeoutError, match="max_duration"):
        await workflow_env.run(too_long)
    assert seconds(began, workflow_env.now()) == 7200
    assert await workflow_env.run(gives_up) == "gave up"


def test_time_begins_where_the_test_says_and_the_same_seed_is_the_same_run():
    start = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)

    @pw.step(max_retries=3, retry_delay=1, retry_backoff=2)
    async def jittered() -> None:
        if pw.current_step().attempt < 4:
            raise ConnectionError

    @pw.workflow
    async def flow() -> str:
        await jittered()
        return f"{pw.now()} {pw.random()} {pw.uuid4()}"

    def once(seed: int) -> str:
        with WorkflowEnv(seed=seed, start=start) as env:
            return env.run_sync(flow)

    assert once(1) == once(1)
    assert once(1) != once(2)
    assert once(1).startswith("2026-03-01")


def test_a_naive_start_is_refused():
    with pytest.raises(pw.ConfigurationError, match="naive"):
        WorkflowEnv(start=dt.datetime(2026, 1, 1))


# What really waits ------------------------------------------------------------------------------------------------


async def test_a_tests_own_sleeps_are_real_and_time_sleep_is_put_back():
    original = time.sleep
    async with WorkflowEnv():
        began = time.perf_counter()
        time.sleep(0.01)
        await asyncio.sleep(0.01)
        assert time.perf_counter() - began >= 0.02
    assert time.sleep is original


async def test_the_clock_stands_still_while_a_thread_works(workflow_env):
    @pw.step(timeout="1h")
    async def in_a_thread() -> float:
        begun = pw.now()
        await asyncio.to_thread(time.sleep, 0.05)
        return seconds(begun, pw.now())

    @pw.workflow
    async def flow() -> list[float]:
        return list(await asyncio.gather(in_a_thread(), waits_async(DAY)))

    assert await workflow_env.run(flow) == [0, DAY]


class Slow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0.05)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


async def test_a_step_talks_to_a_real_server_while_another_sleeps_for_a_day(workflow_env, server):
    client = pw.resource(httpx.AsyncClient, close=httpx.AsyncClient.aclose)

    @pw.step(timeout="1m")
    async def asks() -> str:
        return (await client().get(server)).text

    @pw.workflow
    async def flow() -> list:
        return list(await asyncio.gather(asks(), waits_async(DAY), asks()))

    assert await workflow_env.run(flow) == ["ok", DAY, "ok"]


async def test_a_server_in_the_tests_own_loop_can_answer(workflow_env):
    async def answer(reader, writer):
        await reader.readline()
        await asyncio.sleep(0.01)
        writer.write(b"pong\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    @pw.step
    async def asks() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"ping\n")
        line = await reader.readline()
        writer.close()
        return line

    @pw.workflow
    async def flow() -> bytes:
        return await asks()

    async with server:
        assert await workflow_env.run(flow) == b"pong\n"


async def test_a_real_wait_that_takes_too_long_is_named():
    gate = threading.Event()

    @pw.step
    async def hangs() -> None:
        await asyncio.to_thread(gate.wait)

    @pw.workflow
    async def flow() -> None:
        await hangs()

    async with WorkflowEnv(real_wait=0.05) as env:
        with pytest.raises(RealWaitError, match="a step waits for a thread"):
            await env.run(flow)
        gate.set()


async def test_a_sync_step_may_run_a_loop_of_its_own(workflow_env):
    @pw.step
    def own_loop() -> int:
        async def inner() -> int:
            await asyncio.sleep(0)
            return 7

        return asyncio.run(inner())

    @pw.workflow
    async def flow() -> int:
        return await own_loop()

    assert await workflow_env.run(flow) == 7


async def test_advance_lets_time_pass_and_no_more(workflow_env):
    handle = workflow_env.start(sleeper, DAY)
    await workflow_env.advance("6h")
    assert handle.status() == "parked"
    assert "parked until" in handle.explain().verdict
    began = workflow_env.now()
    await workflow_env.advance("17h")
    assert not handle.done()
    await workflow_env.advance("1h")
    assert handle.done()
    assert seconds(began, workflow_env.now()) == 18 * 3600
