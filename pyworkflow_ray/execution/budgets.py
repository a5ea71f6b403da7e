"""Retry budgets in this process: the names declared here, and the budget of a step's attempts.

Called by the public `RetryBudget`, by the attempt loop's callers (`budget_of`) and by `runtime.budget_actor`, which
brings the cluster's budgets in. Calls `resilience.budget`.

Faults: the cluster's bucket may not answer; the share then goes on with what it has, and on a little credit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.resilience.budget import BudgetSettings
from pyworkflow_ray.resilience.taxonomy import is_throttled


class Budget(Protocol):
    """A retry budget as the attempt loop sees it. Safe for threads; may wait for the cluster for a moment."""

    name: str

    def retry(self, throttled: bool) -> bool:
        """Whether a retry may be made; its tokens are taken."""
        ...

    def success(self) -> None:
        """A step succeeded: tokens come back."""
        ...


class LocalBudget:
    """A budget that lives in this process alone."""

    def __init__(self, name: str, settings: BudgetSettings) -> None:
        self.name = name
        self.settings = settings
        self.available = float(settings.tokens)
        self._lock = threading.Lock()

    def retry(self, throttled: bool) -> bool:
        cost = self.settings.cost(throttled)
        with self._lock:
            if self.available < cost:
                return False
            self.available -= cost
            return True

    def success(self) -> None:
        with self._lock:
            self.available = min(self.settings.tokens, self.available + self.settings.refund)


@dataclass(frozen=True, slots=True)
class Declared:
    name: str
    settings: BudgetSettings
    local: LocalBudget


_declared: dict[str, Declared] = {}
_lock = threading.Lock()
# Set by `runtime.budget_actor` when it is loaded: the cluster's budget, None where this process is in no cluster.
cluster: Callable[[Declared], Budget | None] | None = None
cluster_settings: Callable[[str], dict[str, Any] | None] | None = None


# A test environment's budgets: open ones keep the process's own, and the cluster's, out of its runs. Innermost last.
_apart: list[Callable[[Declared], Budget]] = []


def keep_apart(budgets: Callable[[Declared], Budget]) -> None:
    """From now on a budget of this process is what `budgets` makes of it."""
    _apart.append(budgets)


def end_apart(budgets: Callable[[Declared], Budget]) -> None:
    _apart.remove(budgets)


def declare(name: str, settings: BudgetSettings) -> Declared:
    """The budget of this name in this process, made at its first declaration.

    Raises:
        ConfigurationError: it is declared here with other settings.
    """
    with _lock:
        found = _declared.get(name)
        if found is None:
            found = _declared[name] = Declared(name, settings, LocalBudget(name, settings))
    for option, there in found.settings.model_dump().items():
        here = getattr(settings, option)
        if here != there:
            raise ConfigurationError(
                f"retry budget {name!r} is declared with {option}={here:g}, but in this process it has "
                f"{option}={there:g}: give both the same value, or one of them another name"
            )
    return found


def declared_budgets() -> dict[str, dict[str, Any]]:
    """Name and settings of every budget of this process: what a run takes along, to be known where it goes."""
    return {name: found.settings.model_dump() for name, found in list(_declared.items())}


def budget_of(step: str, name: str | None, settings: Mapping[str, Any] | None = None) -> Budget | None:
    """The budget of a step's attempts, as this process sees it; None where it has none.

    Args:
        settings: Those that travel with the call, for a budget that nothing here has declared.

    Raises:
        ConfigurationError: nobody knows the budget's name.
    """
    if name is None:
        return None
    found = _declared.get(name)
    if found is None:
        if settings is None and cluster_settings is not None:
            settings = cluster_settings(name)
        if settings is None:
            raise ConfigurationError(
                f"step {step!r} has retry_budget={name!r}, and no RetryBudget of that name is declared in this process "
                f"or alive in the cluster: make one, RetryBudget({name!r}), where the step is defined"
            )
        found = declare(name, BudgetSettings.model_validate(settings))
    if _apart:
        return _apart[-1](found)
    shared = cluster(found) if cluster is not None else None
    return found.local if shared is None else shared


def throttled(error: BaseException) -> bool:
    """Whether the service asked for fewer calls: a retry is then cheaper, for it waits longer anyway."""
    return is_throttled(error)
