"""What a test environment raises by itself, beside the errors of the runs in it."""

from __future__ import annotations

from pyworkflow_ray.errors import PyWorkflowError, RunError
from pyworkflow_ray.testing.virtual_loop import RealWaitError

__all__ = ["DeadlockError", "RealWaitError", "RunPausedError"]


class DeadlockError(PyWorkflowError):
    """Nothing is due and nothing runs, yet a run has not ended. The message says what waits, and where."""


class RunPausedError(RunError):
    """The run waits for a person. `.reason` is one of a few words; `await env.get_run(run_id).resume()` goes on."""

    def __init__(self, message: str = "", *, run_id: str = "", reason: str = "") -> None:
        super().__init__(message, run_id=run_id)
        self.reason = reason
