"""`@step` and what it makes: bare and called, copies, refusals, and the request it hands to the engine."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import sys
from typing import Any

import pytest
from pydantic import ValidationError

import pyworkflow_ray as pw
from pyworkflow_ray.engine.calls import StepRequest


class Recorder:
    """An engine that notes what is asked of it and answers with a number."""

    def __init__(self) -> None:
        self.requests: list[StepRequest] = []

    async def call_step(self, request: StepRequest) -> Any:
        self.requests.append(request)
        return len(self.requests)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(sys.modules["pyworkflow_ray.step"], "current_workflow", lambda: recorder)
    return recorder


@pw.step
def price(order: int, factor: int = 2) -> int:
    """What it costs."""
    return order * factor


@pw.step(max_retries=3, retry_on=OSError, breaker="prices", num_cpus=0.5)
async def fetch(order: int) -> int:
    return order


def test_name_documentation_and_signature_are_the_functions() -> None:
    assert (price.__name__, price.__qualname__, price.__doc__, price.__module__) == (
        "price",
        "price",
        "What it costs.",
        __name__,
    )
    assert inspect.signature(price) == inspect.signature(price.fn)
    assert price.__wrapped__ is price.fn
    assert price.fn(3) == 6
    assert inspect.unwrap(price) is price.fn  # type: ignore[arg-type]


def test_inside_a_workflow_a_call_is_a_coroutine_for_sync_and_async_steps(engine: Recorder) -> None:
    async def body() -> list[int]:
        return list(await asyncio.gather(price("7"), fetch(order=1)))  # type: ignore[arg-type]

    call = price(1)
    assert inspect.iscoroutine(call)
    call.close()
    assert asyncio.run(body()) == [1, 2]
    first, second = engine.requests
    assert (first.step, first.args, first.kwargs) == (f"{__name__}:price", (7,), {})
    assert (second.kwargs, second.breaker, second.ray_options) == ({"order": 1}, "prices", {"num_cpus": 0.5})
    assert second.policy.max_retries == 3
    assert first.code.how in ("import", "value")  # by value where the tests' root is not on the import path


def test_wrong_argument_is_raised_where_the_call_is_awaited(engine: Recorder) -> None:
    async def body() -> list[Any]:
        return await asyncio.gather(price(1), price("x"), price(), return_exceptions=True)  # type: ignore[arg-type, call-arg]

    fine, wrong, missing = asyncio.run(body())
    assert fine == 1
    assert isinstance(wrong, ValidationError)
    assert type(missing) is TypeError
    assert len(engine.requests) == 1


def test_elsewhere_a_call_is_that_of_the_function_with_validated_arguments() -> None:
    assert price("7") == 14  # type: ignore[arg-type, comparison-overlap]

    @pw.step
    async def outer(order: int) -> Any:
        return price(order), await fetch.options(breaker=None)(order)

    assert asyncio.run(outer("4")) == (8, 4)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        price("x")  # type: ignore[arg-type]


def test_elsewhere_a_call_has_the_steps_retries() -> None:
    tried: list[int] = []

    @pw.step(max_retries=2, retry_delay=0)
    def flaky(x: int) -> int:
        tried.append(x)
        if len(tried) < 3:
            raise ConnectionError("again")
        return x

    assert flaky(5) == 5  # type: ignore[comparison-overlap]
    assert tried == [5, 5, 5]


def test_options_gives_a_changed_copy_and_leaves_the_original(engine: Recorder) -> None:
    patient = fetch.options(max_retries=9, timeout="5s")
    assert (patient.definition.policy.max_retries, patient.definition.policy.timeout_s) == (9, 5.0)
    assert (fetch.definition.policy.max_retries, fetch.definition.policy.timeout_s) == (3, None)
    assert patient.definition.retry_on == (OSError,)
    assert patient.definition.name == fetch.definition.name
    asyncio.run(_await(patient(1)))
    assert engine.requests[0].policy.max_retries == 9


async def _await(call: Any) -> Any:
    return await call


def test_options_are_checked_as_the_decorator_checks_them() -> None:
    with pytest.raises(pw.ConfigurationError, match=r"price\.options\(\): max_retries=-1"):
        price.options(max_retries=-1)
    with pytest.raises(pw.ConfigurationError, match="Did you mean 'timeout'"):
        price.options(timeot=1)


def test_function_and_options_together_are_refused() -> None:
    with pytest.raises(TypeError, match="either a function or options"):
        pw.step(lambda: 1, max_retries=1)  # type: ignore[call-overload]


def test_remote_says_what_to_use() -> None:
    with pytest.raises(pw.ConfigurationError, match=r"pw\.start"):
        price.remote(1)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = price.nonsense  # type: ignore[attr-defined]


def test_importable_step_is_pickled_by_reference() -> None:
    from pyworkflow_ray import step as step_function

    assert pickle.loads(pickle.dumps(step_function)) is step_function


def test_breaker_without_a_name_is_no_error_before_its_first_use() -> None:
    class Breaker:
        @property
        def name(self) -> str:
            raise pw.ConfigurationError("this breaker needs a name")

        def call(self) -> None: ...

    guarded = pw.step(breaker=Breaker())(lambda: 1)
    with pytest.raises(pw.ConfigurationError, match="needs a name"):
        _ = guarded.definition.breaker_name
