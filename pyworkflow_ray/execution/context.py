"""What code inside a step can ask about itself: `current_step()`, `current_run()`, and the keys it hands to services.

Set by `perform` round each attempt; read by the api (`pyworkflow_ray.context`). Rules:

* it is a context variable: tasks that a step starts see it, threads see it where they are given the context;
* a step called inside a step runs inline: its key is its caller's with its number among the caller's inline calls, so
  that it is the same in all attempts as long as the calls are made in the same order.
"""

from __future__ import annotations

import contextvars
import datetime as dt
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.engine.calls import PreviousFailure, StepCall
from pyworkflow_ray.engine.loop import current_workflow
from pyworkflow_ray.ids import idempotency_key, new_id


@dataclass(slots=True, frozen=True)
class KeyScope:
    """Where in which run a step is: what its idempotency key is made of."""

    storage_id: str = ""
    run_uid: str = ""
    generation: int = 0
    position: str = ""
    item: int | None = None
    inline: int = 0

    @property
    def key(self) -> str:
        return idempotency_key(
            self.storage_id, self.run_uid, self.generation, self.position, self.item, inline=self.inline
        )

    def nested(self, number: int) -> KeyScope:
        """Of inline call `number` of the step here; of a call within an inline one the place is told by both."""
        position = f"{self.position}/{self.inline}" if self.inline else self.position
        return KeyScope(self.storage_id, self.run_uid, self.generation, position, self.item, number)


@dataclass(slots=True)
class StepContext:
    """The running attempt of a step, as `pw.current_step()` gives it.

    Attributes:
        name: Name of the step.
        attempt: Number of this attempt, from 1.
        idempotency_key: For the services it calls: the same in all attempts and recoveries of this step of this run.
        fence: Of two executions of one step the later has the greater; no two are equal.
        run_id: The run, None in a plain call.
        deadline: When this attempt is stopped, None: never.
        previous: Its earlier failures, oldest first: `.attempt .kind .type .message .delay`.
    """

    name: str
    attempt: int
    idempotency_key: str
    fence: tuple[int, ...]
    run_id: str | None = None
    deadline: dt.datetime | None = None
    previous: Sequence[PreviousFailure] = ()
    workflow: str | None = field(default=None, repr=False)
    trace_id: str = field(default="", repr=False)
    traceparent: str = field(default="", repr=False)
    attributes: dict[str, Any] = field(default_factory=dict, repr=False)
    position: str | None = field(default=None, repr=False)
    _is_async: bool = field(default=False, repr=False)
    _scope: KeyScope = field(default_factory=KeyScope, repr=False)
    _clock: Callable[[], float] = field(default=time.time, repr=False)
    _sleep: Callable[[float], Any] = field(default=time.sleep, repr=False)
    _inline_calls: int = field(default=0, repr=False)

    def next_inline(self) -> int:
        """Number of the next inline call."""
        self._inline_calls += 1
        return self._inline_calls


@dataclass(slots=True, frozen=True)
class RunContext:
    """The run that code belongs to, as `pw.current_run()` gives it.

    Attributes:
        run_id: Its id.
        workflow: Name of its workflow.
        trace_id: Its trace, 32 hexadecimal digits.
    """

    run_id: str
    workflow: str
    trace_id: str = ""

    def on_failure(self, step: Any, *args: Any, **kwargs: Any) -> None:
        """Have `step(*args, **kwargs)` undo what the workflow does next or has just done, should the run not complete.

            receipt = await charge(order)
            pw.current_run().on_failure(refund, receipt)

        When the run fails or is cancelled, what was registered runs in reverse order, one after another, as ordinary
        steps of the run: durable, with their own retries and timeouts, over crashes as well. Nothing interrupts them:
        no cancel, no grace, no `max_duration`. Whatever else the run still executes is cancelled before they begin. One
        that fails for good is reported (log, a note at the run's error, its own row) and the next one runs. A run that
        completes runs none of them. A failed run whose compensations ran can't be resumed, for its steps were undone:
        `pw.rerun` begins anew.

        Call it in the workflow's body. The arguments are taken as they are now.

        Raises:
            TypeError, pydantic.ValidationError: the arguments do not fit the step.
            ConfigurationError: `step` is none, or no workflow's body is running here.
        """
        from pyworkflow_ray.errors import ConfigurationError

        workflow = current_workflow()
        if workflow is None:
            raise ConfigurationError("on_failure() is for a workflow's body: register the compensation there")
        if not hasattr(step, "definition") or not hasattr(step, "request"):
            raise ConfigurationError(
                f"on_failure({step!r}): give a step and its arguments, not called: on_failure(refund, receipt)"
            )
        workflow.saga.register(step.request(args, kwargs))


_step: contextvars.ContextVar[StepContext | None] = contextvars.ContextVar("pyworkflow_ray_step", default=None)
_plain_calls = itertools.count(1)


def running_step() -> StepContext | None:
    """The attempt that the running code is in, None outside a step."""
    return _step.get()


class entered:
    """The attempt that code within is in."""

    __slots__ = ("_context", "_token", "_traced")

    def __init__(self, context: StepContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._token = _step.set(self._context)
        self._traced = _tracing[0](self._context) if _tracing is not None else None

    def __exit__(self, *_: object) -> None:
        if self._traced is not None and _tracing is not None:
            _tracing[1](self._traced)
        _step.reset(self._token)


_tracing: tuple[Callable[[StepContext], Any], Callable[[Any], None]] | None = None


def trace_attempts(entering: Callable[[StepContext], Any], leaving: Callable[[Any], None]) -> None:
    """Have `entering(context)` called as each attempt begins, and `leaving` with what it gave, unless None, at its end:
    both in the attempt's own context."""
    global _tracing
    _tracing = (entering, leaving)


def no_sleep(seconds: float) -> None:
    """What a sleep in a step is within `testing.no_waits`."""


def outside_step(function: Callable[[], Any]) -> Any:
    """Call it in a context in which no step is running."""

    def apart() -> Any:
        _step.set(None)
        return function()

    return contextvars.copy_context().run(apart)


def scope_of(call: StepCall) -> KeyScope:
    return KeyScope(call.storage_id, call.run_uid, call.generation, call.position)


def plain_scope() -> tuple[KeyScope, tuple[int, ...]]:
    """Key and fence of a plain call: inline in the step that makes it, else of its own; without the attempt."""
    outer = _step.get()
    if outer is None:
        return KeyScope(run_uid=new_id()), (0, next(_plain_calls))
    number = outer.next_inline()
    return outer._scope.nested(number), (*outer.fence, number)


def instant(at: float | None) -> dt.datetime | None:
    """UNIX seconds as an aware datetime."""
    return None if at is None else dt.datetime.fromtimestamp(at, dt.UTC)
