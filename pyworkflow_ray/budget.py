"""`RetryBudget`: a bound on all retries against one service, shared by every process of the cluster.

Called by users and by `step` (its `retry_budget=`). Calls `execution.budgets`.
"""

from __future__ import annotations

import math
from typing import Any

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.budgets import declare
from pyworkflow_ray.resilience.budget import BudgetSettings

__all__ = ["RetryBudget"]


class RetryBudget:
    """A token bucket that retries draw on, one for each name in the cluster.

    A retry takes `retry_cost` tokens, a success gives `refund` back, and there are never more than `tokens`: while most
    calls succeed every failure is retried, and when a service is down retries end after `tokens / retry_cost`, so that
    they do not keep it down. A step whose budget is empty fails with `RetryBudgetExhausted` from its last error. With
    the defaults, those of today's AWS SDKs, steady extra load stays below 7 %.

    Processes hold shares, and a decision rarely asks the cluster: at most once in a hundred. Without Ray the same class
    works in process.

    Args:
        name: 1 to 128 printable characters; everything that calls one service shares one.
        tokens: Most tokens, and those it begins with, > 0, default 500.
        retry_cost: Price of a retry, > 0, default 14.
        throttle_cost: Price of a retry after an attempt that the server throttled (status 429, or a Retry-After), > 0,
            default 5.
        refund: Tokens that a step's success gives back, ≥ 0, default 1.

    Raises:
        ConfigurationError: an option is wrong, or the name is declared in this process with other settings.
    """

    def __init__(
        self,
        name: str,
        tokens: float = 500,
        retry_cost: float = 14,
        throttle_cost: float = 5,
        refund: float = 1,
    ) -> None:
        if not (isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable()):
            raise ConfigurationError(f"RetryBudget(name={name!r}): a name is 1 to 128 printable characters")
        given = {"tokens": tokens, "retry_cost": retry_cost, "throttle_cost": throttle_cost, "refund": refund}
        for option, value in given.items():
            low_ok = option == "refund"
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
                or value < 0
                or (value == 0 and not low_ok)
            ):
                allowed = "a finite number ≥ 0" if low_ok else "a finite number > 0"
                raise ConfigurationError(f"RetryBudget({option}={value!r}): allowed is {allowed}")
        if tokens < max(retry_cost, throttle_cost):
            raise ConfigurationError(
                f"RetryBudget(tokens={tokens!r}): less than one retry costs (retry_cost={retry_cost!r}, "
                f"throttle_cost={throttle_cost!r}), so none would ever be made"
            )
        self.name = name
        self._declared = declare(name, BudgetSettings(**given))

    @property
    def settings(self) -> dict[str, Any]:
        """The declared settings, as the constructor's options."""
        return self._declared.settings.model_dump()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self.name, self.settings))

    def __repr__(self) -> str:
        return f"RetryBudget({self.name!r}, {', '.join(f'{k}={v:g}' for k, v in self.settings.items())})"


def _restore(name: str, settings: dict[str, Any]) -> RetryBudget:
    return RetryBudget(name, **settings)
