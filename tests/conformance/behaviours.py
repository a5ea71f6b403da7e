"""What a workflow does, whoever runs it: one list of behaviours, checked in a `WorkflowEnv` and on a real Ray.

A behaviour is a workflow with arguments and what comes of it. Times are short because on Ray they are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pydantic

import pyworkflow_ray as pw


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """expect: the result, or a predicate of it. raises: the exception's class and a part of its text.
    retries: how many the run has had, None: not looked at."""

    flow: Any
    args: tuple[Any, ...] = ()
    expect: Any = None
    raises: tuple[type[BaseException], str] | None = None
    retries: int | None = 0


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(name: str, *args: Any, expect: Any = None, raises: Any = None, retries: int | None = 0) -> Callable:
    def add(fn: Callable) -> Any:
        flow = fn if isinstance(fn, pw.Workflow) else pw.workflow(fn)
        BEHAVIOURS[name] = Behaviour(flow, args, expect, raises, retries)
        return flow

    return add


def met(case: Behaviour, result: Any, error: BaseException | None, retries: int) -> str | None:
    """What differs from the behaviour; None: nothing."""
    if case.raises is not None:
        kind, text = case.raises
        if type(error) is not kind or text not in str(error):
            return f"raised {error!r}, or gave {result!r}, not {kind.__name__} with {text!r}"
    elif error is not None:
        return f"raised {error!r}"
    elif callable(case.expect):
        if not case.expect(result):
            return f"gave {result!r}"
    elif result != case.expect or type(result) is not type(case.expect):
        return f"gave {result!r}, not {case.expect!r}"
    if case.retries is not None and retries != case.retries:
        return f"had {retries} retries, not {case.retries}"
    return None


# Values -----------------------------------------------------------------------------------------------------------


class Point(pydantic.BaseModel):
    x: int
    y: int = 0


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


@pw.step(executor="local")
async def echo(value: Any) -> Any:
    return value


@pw.step
def add(x: int, y: int = 1) -> int:
    return x + y


@pw.step(executor="local")
def add_here(x: int, y: int) -> int:
    return x + y


@behaviour("steps follow one another", 1, expect=4)
async def sequence(x: int) -> int:
    return await add_here(await add(await add(x)), 1)


@behaviour("a step gets what was validated", "7", expect=8)
async def validated(x: str) -> int:
    return await add(x)  # type: ignore[arg-type]


@behaviour(
    "values come back as they are", expect=lambda r: r == [(1, "a"), Point(x=1), Pair([1], None), {"__type__": 1}]
)
async def values() -> list:
    given = [(1, "a"), Point(x=1), Pair([1], None), {"__type__": 1}]
    assert [await echo(value) for value in given] == given
    return [await echo(value) for value in given]


@behaviour("equal calls are two calls", expect=[2, 2])
async def equal_calls() -> list[int]:
    return list(await asyncio.gather(add_here(1, 1), add_here(1, 1)))


@behaviour("a result that can't be stored fails the step, once", expect="PayloadError")
async def unstorable() -> str:
    try:
        await makes_a_lock()
    except TypeError as error:
        return type(error).__name__
    return "?"


@pw.step(executor="local", max_retries=3, retry_delay=0)
async def makes_a_lock() -> Any:
    import threading

    return threading.Lock()


# asyncio ----------------------------------------------------------------------------------------------------------


@pw.step(executor="local")
async def after(s: float, value: Any) -> Any:
    await asyncio.sleep(s)
    return value


@behaviour("gather keeps the order of its arguments", expect=["slow", "fast"])
async def gathers() -> list[str]:
    return list(await asyncio.gather(after(0.3, "slow"), after(0.01, "fast")))


@behaviour("as_completed gives what ends first", expect=["fast", "slow"])
async def completes() -> list[str]:
    return [await done for done in asyncio.as_completed([after(0.5, "slow"), after(0.01, "fast")])]


@behaviour("a TaskGroup cancels the rest where one fails", expect=["ValueError"])
async def groups() -> list[str]:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(after(30, "never"))
            group.create_task(refuses())
    except* ValueError as failed:
        names = [type(error).__name__ for error in failed.exceptions]
    return names


@pw.step
async def long_after(s: float) -> None:
    await asyncio.sleep(s)


@behaviour("a timeout in the workflow ends its wait", expect="gave up")
async def gives_up() -> str:
    try:
        async with asyncio.timeout(0.2):  # round a local step it would be seen when that returns
            await long_after(30)
    except TimeoutError:
        return "gave up"
    return "?"


@behaviour("the first of several wins", expect="fast")
async def races() -> str:
    tasks = [asyncio.create_task(after(s, v)) for s, v in ((30, "slow"), (0.01, "fast"))]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return done.pop().result()


@behaviour("a queue hands over between tasks", expect=[1, 2, 3])
async def queues() -> list[int]:
    queue: asyncio.Queue[int] = asyncio.Queue(1)

    async def produce() -> None:
        for i in range(3):
            await queue.put(await add_here(i, 1))

    producer = asyncio.create_task(produce())
    got = [await queue.get() for _ in range(3)]
    await producer
    return got


@behaviour("except Exception round a sleep that parks swallows nothing", expect="woke")
async def parks() -> str:
    before = (pw.random(), pw.uuid4(), pw.now())
    try:
        await pw.sleep(1.2)
    except Exception:
        return "swallowed"
    assert before[2] < pw.now()
    return "woke"


@behaviour("randomness and time are the same after a replay", expect=True)
async def draws() -> bool:
    drawn = [pw.random(), str(pw.uuid4()), pw.now().isoformat()]
    kept = await echo(drawn)
    await asyncio.sleep(1.1)
    return kept == drawn


# Failure ----------------------------------------------------------------------------------------------------------


class Declined(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"declined with {code}")
        self.code = code


@pw.step(executor="local", max_retries=5)
async def refuses() -> None:
    raise ValueError("refused")


@pw.step(max_retries=3, retry_delay=0.05)
def fails(times: int) -> list[Any]:
    step = pw.current_step()
    if step.attempt <= times:
        raise ConnectionError(f"failure {step.attempt}")
    return [step.attempt, [(p.attempt, p.kind, p.type, p.message, p.delay) for p in step.previous]]


@pw.step(executor="local", max_retries=2, retry_delay=0)
async def keyed() -> str:
    step = pw.current_step()
    if step.attempt == 1:
        raise ConnectionError(step.idempotency_key)
    return f"{step.previous[0].message == step.idempotency_key} {len(step.fence)}"


@behaviour(
    "a transient failure is tried again, and the attempt reads the failures before",
    expect=[3, [(i, "transient", "ConnectionError", f"failure {i}", 0.05) for i in (1, 2)]],
    retries=2,
)
async def retries() -> list:
    return await fails(2)


@behaviour("exhausted retries raise the step's own exception", raises=(ConnectionError, "failure 4"), retries=3)
async def exhausted() -> None:
    await fails(9)


@behaviour("a permanent failure is not tried again", expect="refused")
async def permanent() -> str:
    try:
        await refuses()
    except ValueError as error:
        return str(error)
    return "?"


@behaviour("all attempts of a step have one idempotency key", expect="True 3", retries=1)
async def keys() -> str:
    return await keyed()


@pw.step(executor="local", max_retries=2, retry_delay=30)
async def says_when() -> float:
    if pw.current_step().attempt == 1:
        raise pw.RetryableError("busy", retry_after=0.05)
    return pw.current_step().previous[0].delay


@behaviour("retry_after replaces the delay", expect=0.05, retries=1)
async def retry_after() -> float:
    return await says_when()


@pw.step(executor="local", max_retries=3, retry_delay=0, retry_on=Exception)
async def fatal() -> None:
    raise pw.FatalError("never again")


@behaviour("FatalError is never tried again, whatever retry_on says", raises=(pw.FatalError, "never again"))
async def fatally() -> None:
    await fatal()


@pw.step
def declines() -> None:
    try:
        raise KeyError("inner")
    except KeyError as inner:
        raise Declined(code=7) from inner


@behaviour("except finds the step's own class, whole, with its cause", expect=[7, "KeyError"])
async def catches() -> list:
    try:
        await declines()
    except Declined as error:
        return [error.code, type(error.__cause__).__name__]
    return []


@behaviour("what the workflow raises is what result() raises", raises=(Declined, "declined with 9"))
async def raises() -> None:
    raise Declined(code=9)


@pw.step(executor="local")
async def exits() -> None:
    raise SystemExit(3)


@behaviour("SystemExit in a step fails the step", expect="StepFailedError")
async def exiting() -> str:
    try:
        await exits()
    except Exception as error:
        return type(error).__name__
    return "?"


# Time limits ------------------------------------------------------------------------------------------------------


@pw.step(timeout=0.2)
async def hangs() -> None:
    await asyncio.sleep(30)


@pw.step(timeout=0.2)
def blocks() -> None:
    while True:
        try:
            time.sleep(30)
        except Exception:
            pass


@behaviour("a step's timeout is real, in async and sync code", expect=["StepTimeoutError", "StepTimeoutError"])
async def timeouts() -> list[str]:
    failed = await asyncio.gather(hangs(), blocks(), return_exceptions=True)
    return [type(error).__name__ for error in failed]


@behaviour("max_duration ends a run as a timeout", raises=(pw.StepTimeoutError, "max_duration of 0.3 s"))
@pw.workflow(max_duration=0.3)
async def too_long() -> None:
    await asyncio.sleep(30)


@behaviour("a step inside a step is part of it", expect=6)
async def nested() -> int:
    return await outer()


@pw.step(executor="local")
async def outer() -> int:
    return add.fn(1, 2) + add(2)  # type: ignore[operator]


# Breakers ---------------------------------------------------------------------------------------------------------

dead = pw.CircuitBreaker("conformance-dead", failure_threshold=3, recovery_timeout=60)


@pw.step(executor="local", breaker=dead)
async def calls_the_dead() -> None:
    raise ConnectionError("dead")


@behaviour(
    "a run never passes a breaker that its own earlier step has opened",
    expect=["ConnectionError"] * 3 + ["CircuitOpenError"] * 2,
)
async def opens() -> list[str]:
    seen = []
    for _ in range(5):
        try:
            await calls_the_dead()
        except (ConnectionError, pw.CircuitOpenError) as error:
            seen.append(type(error).__name__)
    return seen


# Patterns ---------------------------------------------------------------------------------------------------------


@behaviour("first_success starts the next only when one has failed", expect="fallback")
async def falls_back() -> str:
    return await pw.first_success(refuses(), after(0, "fallback"), after(0, "offline"))


@behaviour("compensations run in reverse order when the run fails", raises=(ValueError, "refused"))
async def compensates() -> None:
    pw.current_run().on_failure(echo, "first")
    pw.current_run().on_failure(echo, "second")
    await refuses()
