"""The handle of a run in a test environment: the public one, whose journal is in memory and whose time is virtual.

Made by `environment`. Waiting for it drives the environment's loop: a run goes on only while somebody waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.handle import RunHandle
from pyworkflow_ray.observability.view import explain
from pyworkflow_ray.storage.storage import RunHistory

if TYPE_CHECKING:
    from pyworkflow_ray.observability.model import RunView
    from pyworkflow_ray.testing.environment import WorkflowEnv
    from pyworkflow_ray.testing.owner import Owner

R = TypeVar("R")


class EnvRunHandle(RunHandle[R], Generic[R]):
    """As `pw.start` gives it. `timeout` of `result` is virtual time.

    Attributes:
        crashes: How often the run's owner has crashed.
    """

    def __init__(self, env: WorkflowEnv, owner: Owner) -> None:
        super().__init__(owner.run_id, cast(Any, env.blobs))
        self._env = env
        self._owner = owner

    @property
    def crashes(self) -> int:
        return self._owner.crashes

    def done(self) -> bool:
        """Whether it has ended; a run that nobody waits for does not go on."""
        return super().done()

    def explain(self) -> RunView:
        """What happened, why, and what happens next, at the environment's time."""
        return explain(self.events(), self._env.clock())

    def cancel(self, reason: str | None = None) -> None:
        """Ask for the run to end, as soon as somebody waits for it."""
        self._owner.cancel(reason)

    def wake(self) -> None:
        """A retry that the run waits for happens now."""
        self._owner.wake()

    def pause(self) -> None:
        """Pause it by hand, once what runs has ended; `await handle` then raises RunPausedError."""
        self._owner.pause()

    def resume(self) -> EnvRunHandle[R]:
        """A paused run goes on, a failed one from its failed step; a run in another state stays as it is. Gives the
        handle itself: `await handle.resume()` waits for the end."""
        self._owner.resume()
        return self

    async def _value_async(self) -> R:
        await self._env.settle_run(self._owner)
        return self._value()

    def _wait(self, timeout: Duration | None) -> None:
        seconds = None if timeout is None else parse_duration(timeout)
        self._env.settle_run_blocking(self._owner, seconds)
        if not self._owner.settled.done():
            raise TimeoutError(f"run {self.run_id!r} has not ended after {seconds} s; it goes on")

    def _value(self) -> R:
        self._owner.check()
        return super()._value()

    def exception(self, timeout: Duration | None = None) -> BaseException | None:
        """Wait for the run, return what `result` would raise; None where it completed."""
        self._wait(timeout)
        self._owner.check()
        return self._error(self._history())

    def _history(self) -> RunHistory:
        events = self._owner.store.events() or [self._owner.created]
        return RunHistory(
            run_id=self.run_id,
            events=events,
            epochs=[0] * len(events),
            epoch=0,
            lease="",
            torn=False,
            detail="",
            finished=events[-1].type in ("run_completed", "run_failed", "run_cancelled"),
            settled=True,
        )
