"""Failures that a test asks for: which attempts of which step fail, and with what.

Used by `environment` (what is asked for) and `owner` (what strikes). Rules:

* a failure is used up by the attempt that it struck, whatever call of the step that is;
* an attempt that a crash took with it, before its failure was durable, gives its failure back: with or without the
  crash the run meets the same failures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution.context import running_step
from pyworkflow_ray.execution.definitions import StepDefinition, registered
from pyworkflow_ray.testing.virtual_loop import outside_loop


@dataclass(slots=True)
class _Order:
    """times: attempts that are still to fail; None: all."""

    error: BaseException | type[BaseException] | None
    times: int | None
    asked: int | None


@dataclass(slots=True)
class Injected:
    """The failures of one environment, by step."""

    orders: dict[str, list[_Order]] = field(default_factory=dict)
    struck: dict[tuple[str, str, int], _Order] = field(default_factory=dict)  # (run id, position, attempt)

    def add(self, step: Any, times: int | None, error: Any) -> None:
        """Raises ConfigurationError: an unknown step, times below 1, no exception."""
        name = step_name(step)
        if times is not None and (isinstance(times, bool) or not isinstance(times, int) or times < 1):
            raise ConfigurationError(
                f"env.fail({name}, times={times!r}): allowed is a whole number ≥ 1, or None: always"
            )
        is_error = isinstance(error, BaseException) or (isinstance(error, type) and issubclass(error, BaseException))
        if error is not None and not is_error:
            raise ConfigurationError(
                f"env.fail({name}, error={error!r}): allowed is an exception or an exception class"
            )
        self.orders.setdefault(name, []).append(_Order(error, times, times))

    def copy(self) -> Injected:
        """The orders as they are now, for an environment of its own."""
        return Injected({name: [replace(order) for order in orders] for name, orders in self.orders.items()})

    def strike(self, step: str, run_id: str, position: str, attempt: int) -> BaseException | None:
        """The failure of this attempt, None where it has none."""
        order = next((o for o in self.orders.get(step, ()) if o.times is None or o.times > 0), None)
        if order is None:
            return None
        self.struck[run_id, position, attempt] = order
        if order.times is not None:
            order.times -= 1
        return _made(order, step)

    def give_back(self, run_id: str, recorded: Callable[[str, int], bool]) -> None:
        """After a crash of the run: `recorded(position, attempt)` says whether that attempt's failure is durable."""
        for key, order in list(self.struck.items()):
            if key[0] == run_id and not recorded(key[1], key[2]):
                del self.struck[key]
                if order.times is not None:
                    order.times += 1

    def watched(self, step: StepDefinition, run_id: str, position: str) -> StepDefinition:
        """The step as the attempt loop executes it here: its function, unless the attempt is to fail."""
        return cast(StepDefinition, _Watched(self, step, run_id, position))


class _Watched:
    """What the attempt loop asks of a step, all of it the step's own but `fn`."""

    def __init__(self, injected: Injected, step: StepDefinition, run_id: str, position: str) -> None:
        self._step = step
        self._strike: Callable[[], BaseException | None] = lambda: injected.strike(
            step.name, run_id, position, _attempt()
        )
        self.is_async = step.is_async
        self.fn = self._async if step.is_async else self._sync

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    async def _async(self, *args: Any, **kwargs: Any) -> Any:
        error = self._strike()
        if error is not None:
            raise error
        return await self._step.fn(*args, **kwargs)

    def _sync(self, *args: Any, **kwargs: Any) -> Any:
        error = self._strike()
        if error is not None:
            raise error
        with outside_loop():  # as in a worker, where a sync step may call asyncio.run
            return self._step.fn(*args, **kwargs)


def _attempt() -> int:
    step = running_step()
    return 0 if step is None else step.attempt


def _made(order: _Order, step: str) -> BaseException:
    text = f"injected failure of step {step}"
    if order.asked is not None and order.times is not None:
        text += f", {order.asked - order.times} of {order.asked}"
    if order.error is None:
        return ConnectionError(text)
    if isinstance(order.error, BaseException):
        return order.error
    try:
        return order.error(text)
    except TypeError:
        return order.error()


def step_name(step: Any) -> str:
    """The registered name of a step, given as itself or by its name, the short one where it is unique.

    Raises:
        ConfigurationError: it is no step, or none of that name is known; the message has the nearest.
    """
    definition = getattr(step, "definition", None)
    if isinstance(definition, StepDefinition):
        return definition.name
    if not isinstance(step, str):
        hint = " Give the object that @step made, not its .fn" if callable(step) else ""
        raise ConfigurationError(f"{step!r} is no step: give a step, or its name.{hint}")
    steps = [found for found in registered("step") if isinstance(found, StepDefinition)]
    names = {found.name for found in steps if step in (found.name, found.qualname)}
    if len(names) == 1:
        return names.pop()
    if names:
        raise ConfigurationError(f"step {step!r} may be any of {', '.join(sorted(names))}: give the step itself")
    known = sorted({found.name for found in steps} | {found.qualname for found in steps})
    near = difflib.get_close_matches(step, known, 1, 0.6)
    hint = f"did you mean {near[0]!r}?" if near else "its module may not be imported yet; give the step itself"
    raise ConfigurationError(f"no step is called {step!r}: {hint}")
