"""What a run that can't go on waits for, in words. Called by `environment` for its error about a deadlock."""

from __future__ import annotations

import asyncio
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyworkflow_ray.testing.owner import Owner


def what_waits(loop: asyncio.AbstractEventLoop, owner: Owner) -> str:
    """The steps that run and where their code stands."""
    steps = [f"step {call.step} (position {call.position})" for call in owner.running()]
    if not steps:
        return "No step runs."
    places = sorted({place for task in asyncio.all_tasks(loop) if (place := _place(task)) is not None})
    where = f" at {', '.join(places)}" if places else ""
    return (
        f"{', '.join(steps)} {'waits' if len(steps) == 1 else 'wait'}{where} for something that no timer, thread or "
        "socket will bring: an Event or Future that nothing sets, a queue that nothing fills"
    )


def _place(task: asyncio.Task[Any]) -> str | None:
    """File, line and function of the innermost frame of a task that is neither asyncio's nor ours."""
    found: FrameType | None = None
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None and not _is_machinery(frame):
            found = frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    if found is None:
        return None
    return f"{found.f_code.co_filename}:{found.f_lineno} in {found.f_code.co_name}"


def _is_machinery(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("asyncio", "pyworkflow_ray")
