"""Code written for the original PyWorkflow's documented API, run by us; what is refused says what to use instead."""

from __future__ import annotations

import asyncio
import datetime as dt
import subprocess
import sys
import textwrap

import pytest

import pyworkflow_ray as pw
import pyworkflow_ray.compat
from pyworkflow_ray.compat import CompatError, _seconds, install

import pyworkflow  # type: ignore[import-not-found]  # isort: skip
from pyworkflow import CircuitBreaker, FatalError, RetryableError, sleep, step, workflow  # isort: skip

CALLS: list[str] = []
breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=60)


class Client:
    """A client at module level, as the original's examples have them."""

    async def get(self, url: str) -> str:
        CALLS.append(url)
        if "down" in url:
            raise ConnectionError(url)
        return f"got {url}"


client = Client()


@step()
async def fetch(url: str) -> str:
    return await client.get(url)


@step(max_retries=0)
async def guarded(url: str) -> str:
    @breaker.call
    async def call() -> str:
        return await client.get(url)

    return await call()


@step
def shout(text: str) -> str:
    return text.upper()


@workflow()
async def onboarding(url: str) -> str:
    first = await fetch(url)
    await sleep("1d")
    return await shout(first)


@workflow(name="compat-outage", max_duration="1w", tags=["billing"])
async def outage(url: str) -> list[str]:
    seen = []
    for _ in range(4):
        try:
            seen.append(await guarded(url))
        except (ConnectionError, pyworkflow.CircuitOpenError) as error:
            seen.append(type(error).__name__)
    return seen


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()


async def test_an_example_of_the_original_runs(workflow_env):
    began = workflow_env.now()
    assert await workflow_env.run(onboarding, "http://users") == "GOT HTTP://USERS"
    assert (workflow_env.now() - began).total_seconds() == 86400


async def test_a_breaker_round_an_inner_function_opens(workflow_env):
    expected = ["ConnectionError"] * 2 + ["CircuitOpenError"] * 2
    assert await workflow_env.run(outage, "http://down") == expected
    assert len(CALLS) == 2
    assert workflow_env.explain().attributes == {"tags": ["billing"]}


async def test_steps_are_retried_three_times_with_growing_delays_unless_told_otherwise(workflow_env):
    with pytest.raises(ConnectionError):
        await workflow_env.run(onboarding, "http://down")
    delays = [e.delay_s for e in workflow_env.events() if e.type == "attempt_failed"]
    assert len(CALLS) == 4
    assert [round(delay) for delay in delays[:3]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({"retry_delay": "fixed"}, [60, 60]),
        ({"retry_delay": "30s"}, [30, 30]),
        ({"retry_delay": [5, 30]}, [5, 30]),
        ({"retry_delay": 10}, [10, 10]),
        ({"retry_delay": 1, "retry_backoff": 3, "max_retry_delay": 2, "jitter": "none"}, [1, 2]),
    ],
)
async def test_retry_delays_are_understood(workflow_env, options, delays):
    @step(max_retries=2, **options)
    async def fails() -> None:
        raise RetryableError("busy")

    @workflow()
    async def flow() -> None:
        await fails()

    with pytest.raises(RetryableError):
        await workflow_env.run(flow)
    assert [e.delay_s for e in workflow_env.events() if e.type == "attempt_failed"][:2] == delays


async def test_errors_of_the_original_keep_their_meaning(workflow_env):
    @step()
    async def fatal() -> None:
        CALLS.append("fatal")
        raise FatalError("no funds", code=7)

    @step(max_retries=1)
    async def later() -> int:
        context = pw.current_step()
        if context.attempt == 1:
            raise RetryableError("busy", retry_after=dt.datetime.fromtimestamp(pw.now().timestamp() + 30))
        return round(context.previous[0].delay)

    @workflow
    async def flow() -> list:
        try:
            await fatal()
        except pyworkflow.WorkflowError as error:
            return [str(error), error.metadata, await later()]
        return []

    assert await workflow_env.run(flow) == ["no funds", {"code": 7}, 30]
    assert CALLS == ["fatal"]


async def test_context_cancellation_and_sleeping_until_an_instant(workflow_env):
    cleaned = []

    @workflow()
    async def flow() -> None:
        context = pyworkflow.get_context()
        try:
            await sleep(pw.now() + dt.timedelta(hours=2), name="wait")
            await sleep(dt.timedelta(weeks=1))
        except pyworkflow.CancellationError:
            cleaned.append((context.run_id, context.workflow_name.rpartition(".")[2], pyworkflow.has_context()))
            raise

    handle = workflow_env.start(flow.options(run_id="c-1"))
    await workflow_env.advance("1d")
    handle.cancel()
    with pytest.raises(pw.RunCancelledError):
        await handle
    assert cleaned == [("c-1", "flow", True)]
    assert not pyworkflow.has_context()


@pytest.mark.parametrize(
    ("text", "seconds"), [("1w", 604800), ("1w2d", 777600), ("1h30m", 5400), (5, 5), ("0.5w", 302400)]
)
def test_durations_know_weeks(text, seconds):
    assert _seconds(text) == seconds


def test_a_step_called_plainly_runs():
    assert shout("hi") == "HI"
    assert asyncio.run(fetch("http://here")) == "got http://here"


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (lambda: pyworkflow.hook, "signals and hooks do not exist yet"),
        (lambda: pyworkflow.start_child_workflow, "child runs do not exist yet"),
        (lambda: pyworkflow.Step, "decorate a function"),
        (lambda: pyworkflow.configure, "pw.init"),
        (lambda: workflow(durable=False), "every run is durable"),
        (lambda: workflow(max_retries=3), "give the retries to its steps"),
        (lambda: workflow(recover_on_worker_loss=False), "max_recovery_attempts=0"),
        (lambda: workflow(tracing={"provider": "x"}), "spans come from the event log"),
        (lambda: step(metadata={"a": 1}), "attributes"),
        (lambda: step(max_retry=1), "max_retries"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_use_instead(make, instead):
    with pytest.raises(pw.ConfigurationError, match=instead):
        make()


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'workflow'"):
        _ = pyworkflow.workflw
    with pytest.raises(pw.ConfigurationError, match="signals and hooks"):
        from pyworkflow import define_hook  # noqa: F401


def test_the_alias_is_made_once_and_another_package_of_that_name_refuses_it(tmp_path):
    assert install() is pyworkflow is sys.modules["pyworkflow"]
    (tmp_path / "pyworkflow").mkdir()
    (tmp_path / "pyworkflow" / "__init__.py").write_text("")
    for script in ("import pyworkflow_ray.compat", "import pyworkflow; import pyworkflow_ray.compat"):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert "CompatError: another package called 'pyworkflow' is installed" in done.stderr
        assert str(tmp_path) in done.stderr
    assert issubclass(CompatError, ImportError)


def test_importing_it_loads_no_ray_and_workers_get_the_alias_too():
    script = textwrap.dedent("""
        import sys, pyworkflow_ray.compat
        from pyworkflow import step, workflow
        from pyworkflow_ray.execution.environment import capture_environment
        print("ray" in sys.modules, capture_environment().preload)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False ('pyworkflow_ray.compat',)"
    from pyworkflow_ray.engine.events import CodeEnvironment
    from pyworkflow_ray.execution.environment import enter_environment, python_version

    without = CodeEnvironment(key="k", python=python_version())
    assert "preload" not in without.model_dump(mode="json")
    script = f"""
import sys
from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.execution.environment import enter_environment
enter_environment(CodeEnvironment(key="k", python={python_version()!r}, preload=("pyworkflow_ray.compat",)))
from pyworkflow import step
print(step.__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "pyworkflow_ray.compat"
    assert enter_environment(without) == []


def test_run_ids_are_texts_that_can_be_awaited():
    run_id = pyworkflow_ray.compat.RunId("run-1")

    async def wait() -> str:
        return await run_id

    assert asyncio.run(wait()) is run_id
    assert pyworkflow_ray.compat._run_id("order-1") == "order-1"
    odd = pyworkflow_ray.compat._run_id("order/1 é")
    assert odd.startswith("key-")
    assert odd == pyworkflow_ray.compat._run_id("order/1 é")
    with pytest.raises(pw.ConfigurationError, match="idempotency_key"):
        pyworkflow_ray.compat._run_id("")
