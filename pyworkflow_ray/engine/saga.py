"""Compensations of one run: what its body asked to have undone, should the run fail or be cancelled.

Pure. Made by `machine`, which wraps the body in `guard`; `current_run().on_failure` registers. Rules:

* A compensation is an ordinary step of the run: scheduled, recorded, retried and recovered like any other. Registering
  records nothing: replay registers again.
* They begin when the run can only end as failed or cancelled: the body has raised, its result can't be stored, or it
  ended after it was asked to cancel. Whatever else the run still does is cancelled first, so that nothing takes effect
  after it was undone.
* They run one at a time, the last registered first. One that fails for good is reported (a log line, a note at the
  run's error, its own row among the steps) and the next one runs.
* They are not interrupted: neither by a cancel, nor by the grace of a cancelled body, nor by the run's max_duration.
  What bounds them is their own policy.
* A body that does not end within the grace of its cancel is abandoned where it stands, and its compensations run.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pyworkflow_ray.engine.calls import StepRequest, encode_arguments
from pyworkflow_ray.engine.events import Payload

if TYPE_CHECKING:
    from pyworkflow_ray.engine.loop import WorkflowLoop

log = logging.getLogger("pyworkflow_ray.run")


class Compensation(NamedTuple):
    """One registered step, with its arguments as they were when it was registered."""

    request: StepRequest
    args: list[Payload]
    kwargs: dict[str, Payload]


class Saga:
    """See the module.

    Args:
        cancelling: Whether the run was asked to cancel: its end is then no success, whatever the body returns.
    """

    def __init__(self, loop: WorkflowLoop, run_id: str, cancelling: Callable[[], bool]) -> None:
        self.running = False
        self.failures: list[tuple[str, Exception]] = []  # name of the step, what it raised
        self._registered: list[Compensation] = []
        self._loop = loop
        self._run_id = run_id
        self._cancelling = cancelling

    def __bool__(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self._registered)

    def register(self, request: StepRequest) -> None:
        """Undo by this step; its arguments are taken as they are now.

        Raises:
            PayloadError: an argument can't be stored.
        """
        loop = self._loop
        loop.codec.store_code(request.code)  # refused now rather than when it is needed
        args, kwargs = encode_arguments(loop.codec, request)
        if not loop.evicted and not self.running:
            self._registered.append(Compensation(request, args, kwargs))

    async def guard(self, body: Awaitable[Any]) -> Any:
        """The body, and what undoes it where the run does not complete."""
        failed: BaseException | None = None
        result: Any = None
        try:
            result = await body
            if self._registered and not self._cancelling():
                self._loop.codec.encode(result)  # a result that can't be stored fails the run
        except BaseException as error:
            if self._loop.evicted:
                self._loop.keep_unended(body)
                raise
            if not self._registered:
                raise
            failed = error
        if self._registered and (failed is not None or self._cancelling()):
            await self.compensate()
        if failed is not None:
            self.note(failed)
            try:
                raise failed
            finally:
                del failed  # no cycle of frame and exception
        return result

    async def compensate(self) -> None:
        """Run what is registered, the last first. Called in the run's main task; all others are stopped for good."""
        self.running = True
        self._loop.freeze()
        while self._registered:
            request, args, kwargs = self._registered.pop()
            try:
                await self._loop.compensate(request, args, kwargs)
            except Exception as error:
                self.failures.append((request.step, error))
                log.error(
                    "run %s: compensation %s failed, %d more to run: %s: %s",
                    self._run_id,
                    request.step,
                    len(self._registered),
                    type(error).__name__,
                    error,
                )

    def note(self, error: BaseException) -> None:
        """Say in the run's error which compensations failed."""
        for step, failure in self.failures:
            try:
                error.add_note(f"compensation {step} failed: {type(failure).__name__}: {failure}")
            except Exception:  # a class may forbid attributes; its error matters more than our notes
                return
