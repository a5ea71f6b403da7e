"""Identifiers: checked before they become a path or a name, and derived where two executions must agree.

Pure but for `new_id`, which asks the operating system for randomness.
"""

from __future__ import annotations

import hashlib
import re
import uuid

from pyworkflow_ray.errors import ConfigurationError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_run_id(run_id: object) -> str:
    """`run_id` itself when it is 1 to 128 of `A-Z a-z 0-9 . _ -` and begins with a letter or a digit.

    Raises:
        ConfigurationError: anything else; nothing has been written.
    """
    if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id):
        return run_id
    shown = repr(run_id) if len(repr(run_id)) <= 80 else repr(run_id)[:77] + "..."
    raise ConfigurationError(
        f"run_id={shown} is no run id: use 1 to 128 of A-Z a-z 0-9 . _ - beginning with a letter or a digit"
    )


def new_id() -> str:
    """32 random hexadecimal digits."""
    return uuid.uuid4().hex


def new_run_id() -> str:
    """A run id for people: short enough to type, long enough not to collide (60 bits)."""
    return "run-" + uuid.uuid4().hex[:15]


def idempotency_key(
    storage_id: str, run_uid: str, generation: int, position: str, item: int | None = None, inline: int = 0
) -> str:
    """The key a step hands to the services it calls: equal for all attempts and recoveries of one step of one run.

    Another storage, run (even of a re-created run id), generation (rerun, fork), position, map item or inline call
    gives another key. 40 hexadecimal digits of SHA-256.
    """
    text = "\x1f".join((storage_id, run_uid, str(generation), position, "" if item is None else str(item), str(inline)))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def span_id(run_uid: str, *parts: object) -> str:
    """16 hexadecimal digits for the span at this place of the run, the same in every process."""
    return hashlib.sha256("\x1f".join(("span", run_uid, *map(str, parts))).encode()).hexdigest()[:16]


def trace_id(run_uid: str) -> str:
    """32 hexadecimal digits: the W3C trace id of a run."""
    return hashlib.sha256(f"trace\x1f{run_uid}".encode()).hexdigest()[:32]


def run_span_id(run_uid: str, life: int = 0) -> str:
    """16 hexadecimal digits: the root span of a run. `life`: of a failed run that was resumed, counted from 0."""
    return span_id(run_uid, "run") if not life else span_id(run_uid, "run", life)


def step_span_id(run_uid: str, position: str, life: int = 0) -> str:
    """The span of a step: from its scheduling to its end, all attempts and waits within. `life`: as often as it was
    begun anew by a resume."""
    return span_id(run_uid, "step", position) if not life else span_id(run_uid, "step", position, life)


def attempt_span_id(run_uid: str, position: str, epoch: int, dispatch: int, attempt: int) -> str:
    """The span of one attempt: the current span of the code inside the step."""
    return span_id(run_uid, "attempt", position, epoch, dispatch, attempt)
