"""What can be done from a page, as a table. Pure. Called by `parts`, for the buttons, and by `actions`, which does it.

Which of them a run is offered follows from the commands that its view names: the view decides, not the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyworkflow_ray.observability.model import RunView


@dataclass(frozen=True)
class Deed:
    """name: of the route, and of the function in `hands`. label: the button's. told: once it is done. asks: it is shown
    folded, for a second press. reason: it takes a reason."""

    name: str
    label: str
    told: str
    says: str = ""
    asks: bool = False
    reason: bool = False


DEEDS: Final = {
    deed.name: deed
    for deed in (
        Deed("wake", "Retry now", "Asked for: the retries that it waits for happen now."),
        Deed("resume", "Resume", "Resumed: it goes on where it stopped."),
        Deed(
            "recover",
            "Recover",
            "Asked for: unfinished runs that nobody holds are taken up.",
            "Takes up all unfinished runs that no living owner holds, this one among them.",
            asks=True,
        ),
        Deed("pause", "Pause", "Asked for: it pauses once the steps that run now have ended."),
        Deed(
            "rerun",
            "Rerun",
            "This is the new run: same workflow, same arguments.",
            "Starts a new run with the same arguments; every step is executed anew.",
            asks=True,
        ),
        Deed(
            "cancel",
            "Cancel",
            "Asked for: its clean-up may still run, then it ends as cancelled.",
            "CancelledError is raised in it; its clean-up may still run.",
            asks=True,
            reason=True,
        ),
    )
}
STEERS: Final = {
    "open": Deed("open", "Open", "Forced open: every call is refused until it is reset or closed by hand.", asks=True),
    "close": Deed("close", "Close", "Forced closed: every call is let through until it is reset or opened by hand."),
    "reset": Deed("reset", "Reset", "Reset: closed, and what it had counted is forgotten."),
}


def offered(view: RunView) -> list[Deed]:
    """The deeds that make sense now, the likeliest first."""
    named = {command.split()[1] if command.startswith("runs ") else command for command in view.commands}
    if view.ended_at is None and any(step.next_at is not None and step.ended_at is None for step in view.steps):
        named.add("wake")
    if view.status in ("pending", "running", "parked"):
        named.add("pause")
    named.add("rerun")
    return [deed for deed in DEEDS.values() if deed.name in named]
