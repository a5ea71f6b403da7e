"""A crash after each event of a run in turn, and whether the run came to the same end each time.

Called by `WorkflowEnv.crash_everywhere`; runs each in an environment of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from pyworkflow_ray.engine.events import Event, Payload, RunCancelled, RunCompleted, RunFailed, StepCompleted
from pyworkflow_ray.engine.events import StepScheduled as Scheduled

if TYPE_CHECKING:
    from pyworkflow_ray.testing.environment import WorkflowEnv
    from pyworkflow_ray.testing.handles import EnvRunHandle
    from pyworkflow_ray.testing.owner import Owner


async def crash_everywhere(
    env: WorkflowEnv, flow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Owner, EnvRunHandle[Any]]:
    """The undisturbed run, once every crash has led to the same end.

    Raises:
        AssertionError: one has not.
    """
    origin = env.copy()  # each run begins where this one begins
    owner, handle = await _once(origin.copy(), flow, args, kwargs, None)
    events = owner.store.events()
    for n in range(1, len(events) + 1):
        other, _ = await _once(origin.copy(), flow, args, kwargs, n)
        why = _difference(env, events, other)
        if why is not None:
            raise AssertionError(f"crash after event {n} of {len(events)} ({_words(events, n - 1)}): {why}")
    return owner, handle


async def _once(
    env: WorkflowEnv, flow: Any, args: tuple[Any, ...], kwargs: dict[str, Any], crash_after: int | None
) -> tuple[Owner, EnvRunHandle[Any]]:
    async with env:
        if crash_after is not None:
            env.crash_after(crash_after)
        handle = env._started(flow, args, kwargs)
        owner = handle._owner
        await env.settle_run(owner)
        if owner.broken is not None:
            raise owner.broken
    return owner, handle


def _difference(env: WorkflowEnv, expected: list[Event], other: Owner) -> str | None:
    events = other.store.events()
    there, here = expected[-1], events[-1]
    if not _same_end(env, there, here):
        return f"the run {_ended(env, here)}, without a crash it {_ended(env, there)}"
    completed = Counter(event.position for event in events if isinstance(event, StepCompleted))
    twice = [position for position, count in completed.items() if count > 1]
    if twice:
        return f"step {_step(events, twice[0])} was completed {completed[twice[0]]} times"
    wanted = {event.position for event in expected if isinstance(event, StepCompleted)}
    missing = wanted - completed.keys()
    extra = completed.keys() - wanted
    if missing:
        return f"step {_step(expected, min(missing))} was not completed, without a crash it was"
    if extra:
        return f"step {_step(events, min(extra))} was completed, without a crash it was not"
    return None


def _same_end(env: WorkflowEnv, there: Event, here: Event) -> bool:
    if isinstance(there, RunCompleted) and isinstance(here, RunCompleted):
        return _same_value(env, there.result, here.result)
    if isinstance(there, RunFailed) and isinstance(here, RunFailed):
        return _error(there) == _error(here)
    if isinstance(there, RunCancelled) and isinstance(here, RunCancelled):
        return there.reason == here.reason
    return type(there) is type(here)


def _same_value(env: WorkflowEnv, one: Payload, other: Payload) -> bool:
    if one.digest is not None and other.digest is not None:
        return (one.enc, one.cls, one.digest) == (other.enc, other.cls, other.digest)
    if (one.enc, one.data, one.ref) == (other.enc, other.data, other.ref):
        return True
    try:
        return bool(env.codec.decode(one) == env.codec.decode(other))
    except Exception:  # it lies in the other environment, or can't be compared
        return False


def _error(event: RunFailed) -> tuple[str, str, str]:
    return event.error.module, event.error.type, event.error.message


def _ended(env: WorkflowEnv, event: Event) -> str:
    if isinstance(event, RunCompleted):
        try:
            return f"completed with {env.codec.decode(event.result)!r}"
        except Exception:
            return "completed with another result"
    if isinstance(event, RunFailed):
        return f"failed with {event.error.type}: {event.error.message}"
    return f"ended as {event.type}"


def _step(events: list[Event], position: str) -> str:
    name = next((e.step for e in events if isinstance(e, Scheduled) and e.position == position), "?")
    return f"{name} (position {position})"


def _words(events: list[Event], index: int) -> str:
    event = events[index]
    position = getattr(event, "position", None)
    return event.type if position is None else f"{event.type} of {_step(events[: index + 1], position)}"
