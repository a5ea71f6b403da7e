"""`RunHandle`: one run, whoever owns it. Its state is read from the storage; waiting for it goes through the runtime's
client where this process has one, else by looking again and again.

Made by `runs`; calls `connection`, the storage, and `observability` for the view.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pyworkflow_ray.connection import client_of, codec_of, need_client, readable_events
from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.engine.events import Event, RunCancelled, RunCompleted, RunCreated, RunFailed
from pyworkflow_ray.engine.history import run_status
from pyworkflow_ray.errors import CodecKeyError, RunCancelledError, RunFailedError, StepFailedError, StorageError

if TYPE_CHECKING:
    from pyworkflow_ray.observability.model import RunView, StepView
    from pyworkflow_ray.storage.port import StoragePort
    from pyworkflow_ray.storage.storage import RunHistory

R = TypeVar("R")

POLL_S = 0.2


class RunStatus(str, Enum):  # noqa: UP042 - `str(status)` and f-strings as of a str, on every Python
    """Where a run stands. *parked*: waits by itself and holds no actor. *paused*: waits for a person."""

    PENDING = "pending"
    RUNNING = "running"
    PARKED = "parked"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __str__ = str.__str__

    @property
    def ended(self) -> bool:
        return self in (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED)


class RunHandle(Generic[R]):
    """One run, whoever owns it. Awaitable; comparable and hashable by run id.

    Attributes:
        run_id: Its id.
    """

    def __init__(self, run_id: str, storage: StoragePort) -> None:
        self.run_id = run_id
        self._storage = storage

    # What the storage knows -------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the run stands now.

        Raises:
            RunNotFoundError, CorruptJournalError: it can't be read.
        """
        return status_of(self._history())

    def done(self) -> bool:
        """Whether it has ended: completed, failed or cancelled."""
        return self._history().finished

    def events(self) -> list[Event]:
        """The run's history so far, oldest first."""
        return list(self._history().events)

    def steps(self) -> list[StepView]:
        """A view of each step, in the order in which they were scheduled."""
        return list(self.explain().steps)

    def explain(self) -> RunView:
        """What happened, why, and what happens next: the model that the command line and notebooks show."""
        from pyworkflow_ray.observability.view import explain

        history = self._history()
        held = self._storage.is_held(history.lease)
        events = readable_events(self._storage, history)
        return explain(events, time.time(), owner_alive=held, torn=history.torn and not history.finished)

    @property
    def trace_id(self) -> str:
        """W3C trace id of the run's spans: the same before and after a crash."""
        return created_of(self._history()).trace_id

    # Its end ----------------------------------------------------------------------------------------------------

    def result(self, timeout: Duration | None = None) -> R:
        """Wait for the run, return its value.

        Args:
            timeout: How long to wait; None: as long as it takes.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            RunCancelledError: it was cancelled.
            RunFailedError: it failed with an exception that can't be restored here.
            The workflow's own exception, with run id and step as notes.
        """
        self._wait(timeout)
        return self._value()

    def exception(self, timeout: Duration | None = None) -> BaseException | None:
        """Wait for the run, return what `result` would raise; None where it completed.

        Raises:
            TimeoutError: as `result`.
        """
        self._wait(timeout)
        return self._error(self._history())

    def __await__(self) -> Generator[Any, None, R]:
        return self._value_async().__await__()

    async def _value_async(self) -> R:
        client = client_of(self._storage)
        if client is None:
            while not self.done():
                await asyncio.sleep(POLL_S)
            return self._value()
        follower = client.follower
        future = follower.ended(self.run_id)
        try:
            if follower.certain(self.run_id) or not self.done():  # looked at once we are told of its end, not before
                await asyncio.wrap_future(future)
        finally:
            follower.forget(self.run_id, future)
        return self._value()

    def cancel(self, reason: str | None = None) -> None:
        """Ask for the run to end: CancelledError is raised in its body, whose `finally` may await steps for a grace.

        Returns at once; a run that has ended stays as it is. `result()` then raises RunCancelledError.

        Raises:
            RunError: another Ray that is alive owns the run.
        """
        if not self.done():
            need_client(self._storage).call("cancel", self.run_id, reason)

    def _wait(self, timeout: Duration | None) -> None:
        seconds = None if timeout is None else parse_duration(timeout)
        client = client_of(self._storage)
        if client is None:
            self._poll(seconds)
            return
        follower = client.follower
        future = follower.ended(self.run_id)
        try:
            if follower.certain(self.run_id) or not self.done():  # looked at once we are told of its end, not before
                future.result(seconds)
        except TimeoutError:
            if not self.done():
                raise TimeoutError(f"run {self.run_id!r} has not ended after {seconds} s; it goes on") from None
        finally:
            follower.forget(self.run_id, future)

    def _poll(self, seconds: float | None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self.done():
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"run {self.run_id!r} has not ended after {seconds} s; it goes on")
            time.sleep(POLL_S)

    def _value(self) -> R:
        client = client_of(self._storage)
        told = client.follower.result_of(self.run_id) if client is not None else None
        if told is not None:
            return cast(R, self._codec().decode(told))
        history = self._history()
        error = self._error(history)
        if error is not None:
            raise error
        end = history.events[-1]
        if not isinstance(end, RunCompleted):
            raise StorageError(f"run {self.run_id!r} has not ended", path=self._storage.root)
        return cast(R, self._codec().decode(end.result))

    def _error(self, history: RunHistory) -> BaseException | None:
        end = next(
            (e for e in reversed(history.events) if isinstance(e, (RunFailed, RunCancelled, RunCompleted))), None
        )
        if isinstance(end, RunCancelled):
            why = f": {end.reason}" if end.reason else ""
            return RunCancelledError(f"run {self.run_id!r} was cancelled{why}", run_id=self.run_id, reason=end.reason)
        if not isinstance(end, RunFailed):
            return None
        codec = self._codec()
        try:
            error = codec.decode_error(end.error)
        except CodecKeyError as missing:
            error = StepFailedError(type=end.error.type)
            error.add_note(f"pyworkflow-ray: {missing}")
        if isinstance(error, StepFailedError) and end.error.type != "StepFailedError":
            message, notes = codec.readable(end.error.message), getattr(error, "__notes__", [])
            error = RunFailedError(
                f"run {self.run_id!r} failed: {end.error.type}: {message}",
                run_id=self.run_id,
                type=end.error.type,
                error_message=message,
                traceback_text=codec.readable(end.error.traceback),
            )
            for note in notes:
                error.add_note(note)
        error.add_note(_where(history, end))
        return cast(BaseException, error)

    def _codec(self) -> Any:
        return codec_of(self._storage).at(self.run_id)

    def _history(self) -> RunHistory:
        return self._storage.read_run(self.run_id)

    def __repr__(self) -> str:
        return f"<run {self.run_id}>"

    def _repr_html_(self) -> str:
        from pyworkflow_ray.watching import handle_html

        return handle_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from pyworkflow_ray.watching import handle_text

        printer.text(handle_text(self))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RunHandle)
            and self.run_id == other.run_id
            and self._storage.storage_id == other._storage.storage_id
        )

    def __hash__(self) -> int:
        return hash((self._storage.storage_id, self.run_id))


# Reading events ---------------------------------------------------------------------------------------------------


def created_of(history: RunHistory) -> RunCreated:
    first = history.events[0]
    assert isinstance(first, RunCreated)
    return first


def status_of(history: RunHistory) -> RunStatus:
    return RunStatus(run_status(history.events))


def _where(history: RunHistory, end: RunFailed) -> str:
    if end.position is None:
        return f"run {history.run_id}"
    for event in history.events:
        if event.type == "step_scheduled" and getattr(event, "position", None) == end.position:
            return f"run {history.run_id}, step {event.step} (position {end.position})"  # type: ignore[attr-defined]
    return f"run {history.run_id}, position {end.position}"
