"""`CircuitBreaker` in one process, without Ray: options, names, guarded calls, nesting, travelling."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import datetime as dt
import logging
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from pyworkflow_ray.breaker import BreakerState, CircuitBreaker
from pyworkflow_ray.errors import CircuitOpenError, ConfigurationError, FatalError
from pyworkflow_ray.execution.breakers import _HELD, CircuitGuard, LocalCircuit, declared, declared_settings, held
from pyworkflow_ray.resilience.breaker import BreakerSettings
from pyworkflow_ray.resilience.breaker_settings import CODE
from pyworkflow_ray.step import step

in_this_module = CircuitBreaker(failure_threshold=9)


def new(threshold: int = 2, recovery_timeout: Any = 60) -> CircuitBreaker:
    return CircuitBreaker(f"test-{uuid.uuid4().hex}", failure_threshold=threshold, recovery_timeout=recovery_timeout)


def fail(breaker: CircuitBreaker, times: int, error: BaseException | None = None) -> None:
    for _ in range(times):
        with pytest.raises(type(error) if error else ConnectionError), breaker:
            raise error or ConnectionError("503")


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"failure_threshold": 0}, r"failure_threshold=0.*≥ 1"),
        ({"failure_threshold": 2.0}, r"failure_threshold=2.0"),
        ({"failure_threshold": True}, r"failure_threshold=True"),
        ({"recovery_timeout": -1}, r"recovery_timeout=-1"),
        ({"recovery_timeout": "soon"}, r"recovery_timeout='soon'"),
        ({"recovery_timeout": None}, r"recovery_timeout=None"),
        ({"name": ""}, r"name=''"),
        ({"name": "a\nb"}, r"1 to 128 printable"),
        ({"name": 7}, r"name=7"),
        ({"failure_treshold": 3}, r"failure_treshold.*did you mean 'failure_threshold'"),
        ({"colour": "red"}, r"no option 'colour'"),
        ({"failure_rate": 0}, r"failure_rate=0.*above 0, at most 1"),
        ({"failure_rate": 1.5}, r"failure_rate=1.5"),
        ({"failure_rate": True}, r"failure_rate=True"),
        ({"slow_call_duration": 0}, r"slow_call_duration=0.*above 0"),
        ({"slow_call_rate": 0.5}, r"slow_call_rate=0.5.*needs slow_call_duration"),
        ({"minimum_calls": 0}, r"minimum_calls=0.*≥ 1"),
        ({"minimum_calls": 10, "window": 5, "failure_rate": 0.5}, r"minimum_calls=10, window=5.*never open"),
        ({"window": 60.0}, r"window=60.0.*the last n calls"),
        ({"window": 0}, r"window=0"),
        ({"window": "0s"}, r"window='0s'"),
        ({"min_nodes": 0}, r"min_nodes=0"),
        ({"half_open_max_calls": 0}, r"half_open_max_calls=0"),
        ({"success_threshold": 0.5}, r"success_threshold=0.5"),
        ({"max_recovery_timeout": "5s"}, r"max_recovery_timeout=5\).*60 s\) or longer"),
        ({"recovery_backoff": 0.5}, r"recovery_backoff=0.5.*≥ 1"),
        ({"ramp": 0}, r"ramp=0.*above 0"),
        ({"counts": 7}, r"counts=7.*exception types"),
        ({"counts": int}, r"counts=.*exception types"),
        ({"name": "host[7]"}, r"no bracket"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_value(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        CircuitBreaker(**options)


def test_options_that_say_what_holds_by_default_are_taken() -> None:
    CircuitBreaker("says-what-holds", half_open_max_calls=1, success_threshold=1, min_nodes=1, failure_rate=None)


@pytest.mark.parametrize("given", [90, "1m30s", dt.timedelta(seconds=90), 90.0])
def test_durations_in_all_forms(given: Any) -> None:
    assert new(5, given).settings == {"failure_threshold": 5, "recovery_timeout": 90.0}


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_module_level_breaker_is_named_after_module_and_variable() -> None:
    assert in_this_module.name == f"{__name__}:in_this_module"


def test_a_breaker_that_no_variable_of_a_module_holds_asks_for_a_name_at_first_use() -> None:
    nameless = CircuitBreaker()
    for use in (lambda: nameless.state, lambda: nameless.name, lambda: pickle.dumps(nameless), nameless.__enter__):
        with pytest.raises(ConfigurationError, match=r"CircuitBreaker\(name="):
            use()


def test_a_breaker_made_by_another_modules_function_is_named_after_the_variable_it_ends_in() -> None:
    maker = types.ModuleType("maker")
    maker.CircuitBreaker = CircuitBreaker  # type: ignore[attr-defined]
    exec("def make(): return CircuitBreaker()", vars(maker))
    user = types.ModuleType("user_of_maker")
    user.make = maker.make  # type: ignore[attr-defined]
    exec("_ = made = make()", vars(user))
    assert user.made.name == "user_of_maker:made"


def test_a_script_is_named_after_its_file(tmp_path: Path) -> None:
    script = tmp_path / "billing.py"
    script.write_text(
        textwrap.dedent(
            """
            import pickle
            from pyworkflow_ray.breaker import CircuitBreaker
            payments = CircuitBreaker()
            print(payments.name, pickle.loads(pickle.dumps(payments)).name)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["billing:payments"] * 2


def test_case_12_same_name_other_settings_names_breaker_option_and_both_values() -> None:
    breaker = new(5, 30)
    with pytest.raises(ConfigurationError) as caught:
        CircuitBreaker(breaker.name, failure_threshold=5, recovery_timeout=45)
    for part in (breaker.name, "recovery_timeout=45", "recovery_timeout=30"):
        assert part in str(caught.value)
    assert CircuitBreaker(breaker.name, failure_threshold=5, recovery_timeout="30s").state == "closed"


def test_unnamed_breakers_are_found_by_their_name_before_their_first_use() -> None:
    module = types.ModuleType("shop_pay")
    module.CircuitBreaker = CircuitBreaker  # type: ignore[attr-defined]
    exec("breaker = CircuitBreaker(failure_threshold=4)", vars(module))
    settings = declared_settings()["shop_pay:breaker"]
    assert {settings.pop(name) != "" for name in CODE} == {True}
    assert settings == {"failure_threshold": 4, "recovery_timeout": 60.0}
    assert declared("shop_pay:breaker") is not None
    assert declared("shop_pay:other") is None


# Guarded calls --------------------------------------------------------------------------------------------------------


def test_opens_after_consecutive_failures_and_refuses_with_the_whole_story() -> None:
    breaker = new(3)
    fail(breaker, 3)
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError) as refused, breaker:
        raise AssertionError("this body must not run")
    error = refused.value
    assert error.name == breaker.name
    assert error.key is None
    assert error.retry_after == pytest.approx(60, abs=5)
    assert error.reason == "3 consecutive failures, the last: ConnectionError: 503"
    assert breaker.name in str(error)
    assert "may try again in" in str(error)


async def test_case_15_sync_and_async_functions_on_any_level() -> None:
    breaker = new(2)

    @breaker.call
    def inner(x: int, *, y: int = 2) -> int:
        """Doc."""
        return x + y

    @breaker.call
    async def inner_async(error: BaseException | None = None) -> str:
        await asyncio.sleep(0)
        if error:
            raise error
        return "done"

    assert inner(1, y=3) == 4
    assert inner.__name__ == "inner"
    assert inner.__doc__ == "Doc."
    assert asyncio.iscoroutinefunction(inner_async)
    assert await inner_async() == "done"
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await inner_async(ConnectionError())
    with pytest.raises(CircuitOpenError):
        await inner_async()
    with pytest.raises(CircuitOpenError):
        inner(1)
    with pytest.raises(CircuitOpenError):
        async with breaker:
            raise AssertionError


def test_case_15_generators_get_a_clear_error() -> None:
    breaker = new()

    def numbers() -> Iterator[int]:
        yield 1

    async def numbers_async() -> AsyncIterator[int]:
        yield 1

    for function in (numbers, numbers_async):
        with pytest.raises(TypeError, match="generator function"):
            breaker.call(function)
    with pytest.raises(TypeError, match="decorates a function"):
        breaker.call(3)  # type: ignore[arg-type]


def test_a_function_that_returns_a_coroutine_is_refused_rather_than_counted() -> None:
    breaker = new(1)

    async def work() -> None: ...

    with pytest.raises(TypeError, match="directly on the async def"):
        breaker.call(lambda: work())()
    assert breaker.state == "closed"


def test_case_4_a_permanent_error_does_not_count() -> None:
    breaker = new(1)
    fail(breaker, 3, ValueError("bad card"))
    fail(breaker, 3, FatalError())
    assert breaker.state == "closed"


async def test_case_5_a_cancelled_call_counts_for_nothing_and_gives_its_permit_back() -> None:
    breaker = new(1, 0)
    fail(breaker, 1)

    @breaker.call
    async def hang() -> None:
        await asyncio.sleep(1000)

    for _ in range(3):  # each of them probes: the one before gave its permit back
        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        assert breaker.state == "half_open"
        with pytest.raises(CircuitOpenError) as refused:
            await hang()
        assert refused.value.retry_after == 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with breaker:
        pass
    assert breaker.state == "closed"


def test_case_7_a_late_result_does_not_close_the_breaker() -> None:
    breaker = new(1, 1000)
    slow = breaker._circuit().enter()
    fail(breaker, 1)
    slow.success()
    assert breaker.state == "open"


def test_case_15_a_probes_inner_call_of_the_same_breaker_rides_on_its_permit() -> None:
    breaker = new(1, 0)
    fail(breaker, 1)

    @breaker.call
    def inner() -> int:
        return 7

    @breaker.call
    def outer() -> int:
        with breaker:
            return inner()

    assert outer() == 7
    assert breaker.state == "closed"


async def test_case_15_nested_calls_do_not_deadlock_in_other_tasks_and_threads() -> None:
    breaker = new(1, 0)
    fail(breaker, 1)

    @breaker.call
    def inner() -> int:
        return 1

    async with breaker:
        assert breaker.state == "half_open"
        assert await asyncio.to_thread(inner) == 1
        assert sum(await asyncio.gather(*(asyncio.to_thread(inner) for _ in range(3)))) == 3
    assert breaker.state == "closed"


@pytest.mark.parametrize(
    ("around", "inside"),
    [
        (around, inside)
        for around in ("call", "with", "async call", "async with", "step")
        for inside in ("call", "with", "step", "gather", "thread")
        if around != "call" or inside not in ("gather", "thread")  # a sync function awaits nothing
    ],
)
async def test_one_failure_in_nested_calls_counts_once(around: str, inside: str) -> None:
    breaker = new(5)

    @breaker.call
    def inner() -> None:
        raise ConnectionError

    @breaker.call
    async def inner_async() -> None:
        raise ConnectionError

    async def fails() -> None:
        try:
            if inside == "with":
                with breaker:
                    raise ConnectionError
            elif inside == "step":
                step(breaker=breaker)(inner.__wrapped__)()  # type: ignore[attr-defined]
            elif inside == "gather":
                await asyncio.gather(inner_async(), asyncio.sleep(0))
            elif inside == "thread":
                await asyncio.to_thread(inner)
            else:
                inner()
        except ConnectionError as error:
            raise TimeoutError("gave up") from error

    def fails_at_once() -> None:
        with contextlib.suppress(StopIteration):
            fails().send(None)

    async def outer() -> None:
        if around == "call":
            breaker.call(fails_at_once)()
        elif around == "with":
            with breaker:
                await fails()
        elif around == "async call":
            await breaker.call(fails)()
        elif around == "async with":
            async with breaker:
                await fails()
        else:
            await step(breaker=breaker)(fails)()

    for _ in range(2):
        with pytest.raises(TimeoutError):
            await outer()
    assert breaker._circuit().look().failures == 2


def test_failures_of_a_users_own_retry_loop_within_a_guarded_call_count_each() -> None:
    breaker = new(3)

    @breaker.call
    def inner() -> None:
        raise ConnectionError

    seen = []
    with breaker:
        for _ in range(5):
            try:
                inner()
            except Exception as error:
                seen.append(type(error).__name__)
    assert seen == ["ConnectionError"] * 3 + ["CircuitOpenError"] * 2


def test_case_10_a_refusal_counts_for_no_breaker() -> None:
    open_one, around = new(1), new(1)
    fail(open_one, 1)
    for _ in range(3):
        with pytest.raises(CircuitOpenError) as refused, around, open_one:
            raise AssertionError
        assert refused.value.name == open_one.name
    assert around.state == "closed"
    assert held(around.name) is None


def test_an_interrupted_call_gives_its_permit_back() -> None:
    breaker = new(1, 0)
    fail(breaker, 1)
    with pytest.raises(KeyboardInterrupt), breaker:
        raise KeyboardInterrupt
    assert breaker.state == "half_open"
    with breaker:
        pass
    assert breaker.state == "closed"


def test_threads_share_the_count() -> None:
    breaker = new(200)
    go = threading.Barrier(4)

    def work() -> None:
        go.wait()
        fail(breaker, 49)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker._circuit().look().failures == 196


def test_the_opening_is_logged_once_and_refusals_are_not(caplog: pytest.LogCaptureFixture) -> None:
    breaker = new(2)
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        fail(breaker, 2)
        for _ in range(5):
            with pytest.raises(CircuitOpenError), breaker:
                raise AssertionError
    [record] = [record for record in caplog.records if breaker.name in record.getMessage()]
    assert record.levelno == logging.CRITICAL


# Travelling -----------------------------------------------------------------------------------------------------------


def test_case_15_a_copy_is_the_same_breaker() -> None:
    breaker = new(2)
    copies = [
        pickle.loads(pickle.dumps(breaker)),
        copy.deepcopy(breaker),
        cloudpickle.loads(cloudpickle.dumps(breaker)),
    ]
    for twin in copies:
        assert (twin.name, twin.settings) == (breaker.name, breaker.settings)
    fail(copies[0], 1)
    fail(copies[1], 1)
    assert breaker.state == copies[2].state == BreakerState.OPEN


def test_a_guarded_inner_function_travels() -> None:
    breaker = new(1)

    @breaker.call
    def inner() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cloudpickle.loads(cloudpickle.dumps(inner))()
    assert breaker.state == "open"


# The attempt loop's view ----------------------------------------------------------------------------------------------


def test_the_guard_of_a_step_counts_kinds_and_refuses() -> None:
    now = 0.0
    guard = CircuitGuard(LocalCircuit("guarded", BreakerSettings(2, 10.0), clock=lambda: now))
    assert guard.state == "closed"
    guard.acquire().failure("permanent", ValueError())
    guard.acquire().failure("timeout", TimeoutError())
    guard.acquire().release()
    guard.acquire().failure("transient", ConnectionError("503"))
    assert guard.state == "open"
    assert guard.generation > 0
    with pytest.raises(CircuitOpenError) as refused:
        guard.acquire()
    assert refused.value.retry_after == 10.0
    now = 10.0
    permit = guard.acquire()
    assert guard.state == "half_open"
    permit.success()
    permit.failure("transient", ConnectionError())  # ended once: a second end is ignored
    assert guard.state == "closed"


def test_a_permit_ends_once_and_is_forgotten() -> None:
    circuit = LocalCircuit("ends-once", BreakerSettings(5, 10.0))
    permit = circuit.enter()
    for _ in range(3):
        permit.failure("transient", ConnectionError())
    assert circuit.look().failures == 1
    assert held("ends-once") is None


def test_calls_that_overlap_for_ever_leave_no_chain_behind() -> None:
    """Each begins before the one before it has ended, in one context."""
    circuit = LocalCircuit("overlaps", BreakerSettings(5, 10.0))
    before = circuit.enter()
    for _ in range(100):
        permit = circuit.enter()
        before.success()
        before = permit
    length, around = 0, _HELD.get()
    while around is not None:
        length, around = length + 1, around.around
    assert length <= 3


def test_a_call_that_begins_while_another_opens_the_breaker_began_before() -> None:
    """It read the state without the lock, in the very moment of the change: it is a late call, not an illegal one."""
    circuit = LocalCircuit("moment", BreakerSettings(1, 10.0))
    machine, began = circuit._breaker, []
    view = machine.view

    def look(now: float) -> Any:
        if not began and machine.state == "open":
            began.append(contextvars.copy_context().run(circuit.enter))
        return view(now)

    machine.view = look  # type: ignore[method-assign]
    circuit.enter().failure("transient", ConnectionError())
    [permit] = began
    permit.failure("transient", ConnectionError())
    assert circuit.look().state == "open"
    assert circuit.look().failures == 1


async def test_the_guard_of_an_async_attempt() -> None:
    guard = CircuitGuard(LocalCircuit("guarded-async", BreakerSettings(1, 10.0), clock=lambda: 0.0))
    (await guard.acquire_async()).failure("transient", ConnectionError())
    with pytest.raises(CircuitOpenError):
        await guard.acquire_async()


def test_a_breaker_needs_no_ray() -> None:
    code = (
        "import sys; from pyworkflow_ray.breaker import CircuitBreaker; b = CircuitBreaker('x')\n"
        "with b: pass\nassert b.state == 'closed' and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class NoLock:
    """A lock that nobody may take."""

    def __enter__(self) -> None:
        raise AssertionError("a lock was taken")

    def __exit__(self, *error: object) -> None: ...


async def test_case_16_a_closed_call_takes_no_lock() -> None:
    breaker = new(2)
    circuit = breaker._circuit()
    circuit._lock = NoLock()  # type: ignore[attr-defined]

    @breaker.call
    async def guarded() -> int:
        return breaker.call(lambda: 1)()

    assert await guarded() == 1
    with breaker:
        pass
    async with breaker:
        pass
    with pytest.raises(AssertionError, match="a lock was taken"), breaker:
        raise ConnectionError
