"""Durable workflows on Ray, whose subject is failure: retries, timeouts, circuit breakers, crash recovery.

    import pyworkflow_ray as pw

    @pw.step(max_retries=5, retry_delay="1s", retry_backoff=2)
    async def charge(order_id: str, amount: int) -> str: ...

    @pw.workflow
    async def checkout(order_id: str, amount: int) -> str:
        return await charge(order_id, amount)

    pw.run(checkout, "order-42", 1999)

A run records each step's outcome before it goes on: killed at any moment, it is taken up where it stopped. Importing
this package starts nothing and loads neither ray nor duckdb; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that has it.
_HOMES: dict[str, str] = {
    "step": "pyworkflow_ray.step",
    "Step": "pyworkflow_ray.step",
    "workflow": "pyworkflow_ray.workflow",
    "Workflow": "pyworkflow_ray.workflow",
    "resource": "pyworkflow_ray.execution.resource",
    "classify": "pyworkflow_ray.resilience.taxonomy",
    "Alert": "pyworkflow_ray.execution.alerts",
    "on_alert": "pyworkflow_ray.execution.alerts",
    "on_breaker_open": "pyworkflow_ray.execution.hooks",
    "on_retry": "pyworkflow_ray.execution.hooks",
    "on_run_failed": "pyworkflow_ray.execution.hooks",
    "register_kind": "pyworkflow_ray.resilience.taxonomy",
    "CircuitBreaker": "pyworkflow_ray.breaker",
    "RetryBudget": "pyworkflow_ray.budget",
    **dict.fromkeys(("BatchResult", "first_success"), "pyworkflow_ray.batch"),
    **dict.fromkeys(("HealthReport", "health"), "pyworkflow_ray.health"),
    "watch": "pyworkflow_ray.watching",
    **dict.fromkeys(
        (
            "RunHandle",
            "RunStatus",
            "as_completed",
            "get_run",
            "init",
            "list_runs",
            "pause",
            "recover",
            "rerun",
            "resume",
            "run",
            "shutdown",
            "sql",
            "start",
            "start_async",
            "start_many",
            "wake",
        ),
        "pyworkflow_ray.runs",
    ),
    **dict.fromkeys(
        ("current_run", "current_step", "get_logger", "now", "random", "sleep", "uuid4"),
        "pyworkflow_ray.context",
    ),
    **dict.fromkeys(
        (
            "CircuitOpenError",
            "ConfigurationError",
            "CorruptJournalError",
            "FatalError",
            "ItemNotDoneError",
            "NonDeterminismError",
            "PyWorkflowError",
            "RetryBudgetExhausted",
            "RetryableError",
            "RunCancelledError",
            "RunExistsError",
            "RunFailedError",
            "RunNotFoundError",
            "StepFailedError",
            "StepLostError",
            "StepTimeoutError",
            "StorageError",
            "TooManyRunsError",
        ),
        "pyworkflow_ray.errors",
    ),
}

__all__ = [
    "Alert",
    "BatchResult",
    "CircuitBreaker",
    "CircuitOpenError",
    "ConfigurationError",
    "CorruptJournalError",
    "FatalError",
    "HealthReport",
    "ItemNotDoneError",
    "NonDeterminismError",
    "PyWorkflowError",
    "RetryBudget",
    "RetryBudgetExhausted",
    "RetryableError",
    "RunCancelledError",
    "RunExistsError",
    "RunFailedError",
    "RunHandle",
    "RunNotFoundError",
    "RunStatus",
    "Step",
    "StepFailedError",
    "StepLostError",
    "StepTimeoutError",
    "StorageError",
    "TooManyRunsError",
    "Workflow",
    "as_completed",
    "classify",
    "current_run",
    "current_step",
    "first_success",
    "get_logger",
    "get_run",
    "health",
    "init",
    "list_runs",
    "now",
    "on_alert",
    "on_breaker_open",
    "on_retry",
    "on_run_failed",
    "pause",
    "random",
    "recover",
    "register_kind",
    "rerun",
    "resource",
    "resume",
    "run",
    "shutdown",
    "sleep",
    "sql",
    "start",
    "start_async",
    "start_many",
    "step",
    "uuid4",
    "wake",
    "watch",
    "workflow",
]

if TYPE_CHECKING:
    from pyworkflow_ray.batch import BatchResult, first_success
    from pyworkflow_ray.breaker import CircuitBreaker
    from pyworkflow_ray.budget import RetryBudget
    from pyworkflow_ray.context import current_run, current_step, get_logger, now, random, sleep, uuid4
    from pyworkflow_ray.errors import (
        CircuitOpenError,
        ConfigurationError,
        CorruptJournalError,
        FatalError,
        ItemNotDoneError,
        NonDeterminismError,
        PyWorkflowError,
        RetryableError,
        RetryBudgetExhausted,
        RunCancelledError,
        RunExistsError,
        RunFailedError,
        RunNotFoundError,
        StepFailedError,
        StepLostError,
        StepTimeoutError,
        StorageError,
        TooManyRunsError,
    )
    from pyworkflow_ray.execution.alerts import Alert, on_alert
    from pyworkflow_ray.execution.hooks import on_breaker_open, on_retry, on_run_failed
    from pyworkflow_ray.execution.resource import resource
    from pyworkflow_ray.health import HealthReport, health
    from pyworkflow_ray.resilience.taxonomy import classify, register_kind
    from pyworkflow_ray.runs import (
        RunHandle,
        RunStatus,
        as_completed,
        get_run,
        init,
        list_runs,
        pause,
        recover,
        rerun,
        resume,
        run,
        shutdown,
        sql,
        start,
        start_async,
        start_many,
        wake,
    )
    from pyworkflow_ray.step import Step, step
    from pyworkflow_ray.watching import watch
    from pyworkflow_ray.workflow import Workflow, workflow


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_nearest(name)}")


def _nearest(name: str) -> str:
    if name.startswith("_"):
        return ""
    import difflib

    matches = difflib.get_close_matches(name, __all__, 1, 0.7)
    return f". Did you mean {matches[0]!r}?" if matches else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """This package: where a public name is also a submodule's (step, workflow), the name means the public object."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds each submodule to its package once it is loaded
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # code that goes by value has this package among its globals; picklers know modules by their exact class
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
