"""Retry budgets of steps: what a retry costs, what happens when nothing is left, and how names are found."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import httpx
import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution import budgets
from pyworkflow_ray.execution.budgets import budget_of, declared_budgets, throttled
from tests.unit.execution.calls import Execution, error_of, execute


def answer(status: int, **headers: str) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://x")
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError(f"status {status}", request=request, response=response)


def left(name: str) -> float:
    return budgets._declared[name].local.available


@pytest.mark.parametrize("is_async", [False, True])
def test_case_11_an_empty_budget_ends_the_retrying_with_its_own_error_from_the_last(is_async: bool) -> None:
    name = f"payments-{is_async}"
    budget = pw.RetryBudget(name, tokens=28)

    @pw.step(max_retries=9, retry_delay=0, retry_budget=budget)
    def sync() -> None:
        raise ConnectionError("refused")

    @pw.step(max_retries=9, retry_delay=0, retry_budget=budget)
    async def later() -> None:
        raise ConnectionError("refused")

    with pytest.raises(pw.RetryBudgetExhausted, match=rf"attempt 3 .*'{name}' is empty") as caught:
        asyncio.run(later()) if is_async else sync()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert caught.value.__notes__[-1].endswith(f"no further attempt: retry budget '{name}' is empty")
    assert pw.classify(caught.value) == "cascade"


def test_case_11_the_attempt_says_so_and_the_workflow_gets_the_error_with_its_cause() -> None:
    pw.RetryBudget("attempts", tokens=14)

    @pw.step(max_retries=9, retry_delay=0, retry_budget="attempts")
    def failing() -> None:
        raise ConnectionError("refused")

    outcome = execute(failing)
    assert (outcome.why, outcome.attempt) == ("budget", 2)
    assert [a.delay_reason for a in outcome.attempts] == ["fixed", "retry budget 'attempts' is empty"]
    error = error_of(outcome)
    assert isinstance(error, pw.RetryBudgetExhausted)
    assert isinstance(error.__cause__, ConnectionError)


def test_a_retry_costs_less_where_the_server_throttles_and_a_success_gives_back() -> None:
    pw.RetryBudget("prices")
    errors: list[Exception] = []

    @pw.step(max_retries=9, retry_delay=0, retry_budget="prices")
    def flaky() -> None:
        if errors:
            raise errors.pop()

    flaky()
    assert left("prices") == 500, "never more than the tokens"
    errors.append(ConnectionError("refused"))
    flaky()
    assert left("prices") == 500 - 14 + 1
    errors.append(answer(429))
    flaky()
    assert left("prices") == 500 - 14 - 5 + 2


def test_throttling_is_told_by_status_or_retry_after() -> None:
    assert throttled(answer(429))
    assert throttled(answer(503, **{"Retry-After": "1"}))
    assert not throttled(answer(503))
    assert not throttled(ConnectionError())


def test_a_failure_that_is_not_retried_takes_nothing() -> None:
    pw.RetryBudget("permanent")

    @pw.step(max_retries=9, retry_budget="permanent")
    def wrong() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        wrong()
    assert left("permanent") == 500


def test_a_budget_is_known_by_what_travels_with_the_call() -> None:
    @pw.step(max_retries=9, retry_delay=0, retry_budget="elsewhere")
    def failing() -> None:
        raise ConnectionError("refused")

    outcome = Execution().run(failing, budget_settings={"tokens": 14, "retry_cost": 14})
    assert (outcome.why, outcome.attempt) == ("budget", 2)
    assert declared_budgets()["elsewhere"]["tokens"] == 14


def test_a_name_that_nobody_knows_is_a_configuration_error() -> None:
    @pw.step(retry_budget="nowhere")
    def any_step() -> None: ...

    with pytest.raises(pw.ConfigurationError, match=r"retry_budget='nowhere'.*RetryBudget\('nowhere'\)"):
        any_step()
    outcome = execute(any_step)
    assert (outcome.status, outcome.why) == ("failed", "code")
    assert isinstance(error_of(outcome), pw.ConfigurationError)
    assert budget_of("x", None) is None


def test_other_settings_under_one_name_are_refused_naming_both() -> None:
    pw.RetryBudget("twice", tokens=100)
    pw.RetryBudget("twice", tokens=100)
    with pytest.raises(pw.ConfigurationError, match=r"'twice'.*tokens=200.*tokens=100"):
        pw.RetryBudget("twice", tokens=200)


@pytest.mark.parametrize(
    "given",
    [{"tokens": 0}, {"tokens": -1}, {"retry_cost": 0}, {"refund": -1}, {"tokens": True}, {"throttle_cost": "5"}],
)
def test_a_wrong_option_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(pw.ConfigurationError, match=next(iter(given))):
        pw.RetryBudget("wrong", **given)


def test_a_budget_that_could_never_pay_a_retry_is_refused() -> None:
    with pytest.raises(pw.ConfigurationError, match="tokens=10"):
        pw.RetryBudget("poor", tokens=10)


def test_a_budget_travels_by_name_and_settings() -> None:
    budget = pw.RetryBudget("travels", tokens=50, refund=0)
    again = pickle.loads(pickle.dumps(budget))
    assert (again.name, again.settings) == (budget.name, budget.settings)
    assert repr(again) == "RetryBudget('travels', tokens=50, retry_cost=14, throttle_cost=5, refund=0)"
