"""Several awaitables as one: `first_success`, one after another until one succeeds.

Called by users, in workflows, in steps and elsewhere alike: what is durable is the steps that are awaited.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable
from typing import Any, TypeVar

from pyworkflow_ray.errors import ConfigurationError

T = TypeVar("T")


async def first_success(*coroutines: Awaitable[T]) -> T:
    """The value of the first that succeeds: each is started only when the one before it has failed.

        price = await pw.first_success(primary(key), replica(key), cached(key))

    What was not started is closed, never run: so is everything after a success, and after a cancellation, which is no
    failure and is raised at once. In a workflow each failed step is recorded, and a crash goes on with the one that
    was running.

    Raises:
        ExceptionGroup: all have failed; it holds their exceptions, in order.
        ConfigurationError: nothing was given, or a value that can't be awaited (a `def` step that was called outside a
            workflow has run already: its call gives the value itself).
    """
    waiting = list(coroutines)
    failures: list[Exception] = []
    try:
        _check(waiting)
        while waiting:
            try:
                return await waiting.pop(0)
            except Exception as error:
                failures.append(error)
        raise ExceptionGroup(f"none of {len(failures)} succeeded", failures)
    finally:
        failures = []  # no cycle of frame and exceptions
        for unstarted in waiting:
            if inspect.iscoroutine(unstarted):
                unstarted.close()


def _check(given: list[Any]) -> None:
    if not given:
        raise ConfigurationError("first_success() was given nothing to await")
    for number, item in enumerate(given, 1):
        if not inspect.isawaitable(item):
            raise ConfigurationError(
                f"first_success: argument {number} is a {type(item).__name__}, which can't be awaited. Give calls of "
                "async steps; a def step gives a coroutine in a workflow only, elsewhere its call is the value"
            )
