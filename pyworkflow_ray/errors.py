"""Every error of pyworkflow_ray, under one root.

All of them survive pickle with their fields, keyword-only constructor arguments included: the base class rebuilds an
instance from its `args` and `__dict__`, and never calls a constructor again. Nothing here is a control signal: the
runtime never drives user code by raising one of these as an `Exception`.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from pyworkflow_ray.durations import Duration, parse_duration


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class PyWorkflowError(Exception):
    """Root of all errors that pyworkflow_ray raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


# What a step raises on purpose ------------------------------------------------------------------------------------


class FatalError(PyWorkflowError):
    """Raised by a step that must not be tried again, whatever `retry_on` says."""


class RetryableError(PyWorkflowError):
    """Raised by a step that should be tried again while attempts last.

    Args:
        message: What happened.
        retry_after: How long to wait before the next attempt: seconds, text such as "30s", a `timedelta`, or an aware
            `datetime` at which to try again. None leaves the delay to the step's policy. It replaces the computed
            delay and may exceed `max_retry_delay`.

    Raises:
        ConfigurationError: `retry_after` is negative, a naive datetime, or no duration at all.
    """

    def __init__(self, message: str = "", *, retry_after: Duration | dt.datetime | None = None) -> None:
        super().__init__(message)
        if isinstance(retry_after, dt.datetime):
            if retry_after.tzinfo is None:
                raise ConfigurationError(
                    f"retry_after={retry_after!r} is a naive datetime: give an aware one, "
                    "for example datetime.now(timezone.utc) + timedelta(seconds=30)"
                )
            self.retry_after: float | dt.datetime | None = retry_after
        elif retry_after is None:
            self.retry_after = None
        else:
            try:
                self.retry_after = parse_duration(retry_after)
            except (ValueError, TypeError) as error:
                raise ConfigurationError(f"retry_after={retry_after!r}: {error}") from None

    def delay_s(self, now: float) -> float | None:
        """Seconds to wait from `now` (a UNIX timestamp); None when the policy decides."""
        if isinstance(self.retry_after, dt.datetime):
            return max(0.0, self.retry_after.timestamp() - now)
        return self.retry_after


class ItemNotDoneError(PyWorkflowError):
    """Stands for an item of a map that stopped early before the item ended. It may have been executed in part.

    Attributes:
        index: Of the item in the map.
    """

    def __init__(self, message: str = "", *, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


# What the runtime raises for a step -------------------------------------------------------------------------------


class StepTimeoutError(PyWorkflowError, TimeoutError):
    """One attempt of a step ran longer than its `timeout`, and was stopped."""


class StepLostError(PyWorkflowError):
    """The outcome of a step is unknown and it may not, or no longer, be executed again.

    Raised in the workflow for `idempotent=False` steps whose worker was lost or killed, and for any step whose
    `max_recoveries` are used up.
    """


class StepFailedError(PyWorkflowError):
    """A step failed with an exception that could not be restored here.

    Attributes:
        type: Qualified name of the original exception's class.
        message: Its text.
        traceback_text: Its traceback as text.
    """

    def __init__(self, message: str = "", *, type: str = "", traceback_text: str = "") -> None:
        super().__init__(f"{type}: {message}" if type else message)
        self.type = type
        self.message = message
        self.traceback_text = traceback_text


class CircuitOpenError(PyWorkflowError):
    """A circuit breaker refused the call.

    Attributes:
        name: Name of the breaker.
        key: Key within the breaker, None for the breaker itself.
        reason: Why it is open, in words.
        retry_after: Seconds of open time that are left; 0 in half-open, None when forced open.
    """

    ask_again_s: float | None = None  # of a step that waits: when it is to ask again

    def __init__(
        self,
        message: str = "",
        *,
        name: str = "",
        key: str | None = None,
        reason: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.name = name
        self.key = key
        self.reason = reason
        self.retry_after = retry_after


class RetryBudgetExhausted(PyWorkflowError):
    """The shared retry budget had no tokens left for another retry."""


# What handles raise -----------------------------------------------------------------------------------------------


class RunError(PyWorkflowError):
    """An error about one run. `.run_id` names it."""

    def __init__(self, message: str = "", *, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id


class RunFailedError(RunError):
    """A run failed with an exception that could not be restored here (`.type`, `.message`, `.traceback_text`)."""

    def __init__(
        self, message: str = "", *, run_id: str = "", type: str = "", error_message: str = "", traceback_text: str = ""
    ) -> None:
        super().__init__(message, run_id=run_id)
        self.type = type
        self.message = error_message
        self.traceback_text = traceback_text


class RunCancelledError(RunError):
    """The run was cancelled. `.reason` is what the canceller gave."""

    def __init__(self, message: str = "", *, run_id: str = "", reason: str | None = None) -> None:
        super().__init__(message, run_id=run_id)
        self.reason = reason


class TooManyRunsError(PyWorkflowError):
    """No run is started: as many as `max_pending` allows wait for a run actor already. Nothing was written.

    Attributes:
        pending: Runs that wait. limit: `max_pending`.
    """

    def __init__(self, message: str, *, pending: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.pending = pending
        self.limit = limit


class RunExistsError(RunError):
    """A run of this id exists with another workflow or other arguments."""


class RunNotFoundError(RunError, LookupError):
    """No run of this id is in the storage."""


class NonDeterminismError(RunError):
    """The workflow's code no longer does what the run's history says. The run is paused, nothing was executed.

    Attributes:
        position: Place in the program at which they part.
        recorded: What the history has there.
        attempted: What the code did there.
        remedy: The way out.
    """

    def __init__(
        self,
        message: str = "",
        *,
        run_id: str = "",
        position: str = "",
        recorded: str = "",
        attempted: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message, run_id=run_id)
        self.position = position
        self.recorded = recorded
        self.attempted = attempted
        self.remedy = remedy


# Storage, configuration -------------------------------------------------------------------------------------------


class StorageError(PyWorkflowError):
    """The storage could not be read or written. `.path` names the file."""

    def __init__(self, message: str = "", *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class CorruptJournalError(StorageError):
    """A file of the storage is damaged: it is refused, never quietly skipped."""


class FencedError(StorageError):
    """Another owner took the run over: this append was not acknowledged and never will be."""


class PayloadError(PyWorkflowError, TypeError):
    """A value can't be stored: no encoding keeps it exactly, it is too large, or pickles are switched off."""


class CodecKeyError(PayloadError):
    """A stored value is encrypted, and its key, or the codec that has it, is not here. Nothing is lost by it."""


class ConfigurationError(PyWorkflowError, ValueError):
    """An option, argument, setting or name is wrong. The message names it, its value and the remedy."""


UNREADABLE = (CodecKeyError, CorruptJournalError)  # of a stored value: not the workflow's failure, its run pauses
