"""Runs as people see them: lists of handles that show themselves as tables, and `watch`, which follows runs live.

Called by users, and by `runs` and `handle`, which give these lists and views; calls `observability` and the storage.
Nothing here changes a run or waits with a lock held. In a notebook one output is replaced again and again; on a
terminal a block is drawn over itself on stderr; anywhere else news come as lines on stderr.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from pyworkflow_ray.durations import Duration, parse_duration
from pyworkflow_ray.errors import PyWorkflowError

if TYPE_CHECKING:
    from pyworkflow_ray.handle import RunHandle
    from pyworkflow_ray.observability.model import RunView

__all__ = ["RunList", "watch"]

R = TypeVar("R")
log = logging.getLogger("pyworkflow_ray")
SHOWN = 100


class RunList(list["RunHandle[R]"]):
    """Handles, an ordinary list of them, that a notebook shows as a table: state, why, what comes next."""

    def _look(self) -> tuple[list[RunView], int, list[str]]:
        views, damaged = [], []
        for handle in self[:SHOWN]:
            try:
                views.append(view_of(handle))
            except (PyWorkflowError, ValueError) as error:
                damaged.append(f"{handle.run_id}: {error}")
        return views, max(0, len(self) - SHOWN), damaged

    def _repr_html_(self) -> str:
        from pyworkflow_ray.observability.lists import list_html

        return list_html(*self._look())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from pyworkflow_ray.observability.lists import list_text

        printer.text(list_text(*self._look()))


def view_of(handle: RunHandle[Any]) -> RunView:
    """The run explained, in local time."""
    from pyworkflow_ray.observability.view import explain
    from pyworkflow_ray.observability.zone import LocalZone

    history = handle._history()
    held = handle._storage.is_held(history.lease)
    torn = history.torn and not history.finished
    return explain(history.events, time.time(), tz=LocalZone(), owner_alive=held, torn=torn)


def handle_html(handle: RunHandle[Any]) -> str:
    from pyworkflow_ray.observability.html import render_html
    from pyworkflow_ray.observability.zone import LocalZone

    try:
        return render_html(view_of(handle), LocalZone())
    except (PyWorkflowError, ValueError) as error:
        return f"<div><b>{escape(handle.run_id)}</b> can't be shown: {escape(str(error))}</div>"


def handle_text(handle: RunHandle[Any]) -> str:
    from pyworkflow_ray.observability.text import render_text
    from pyworkflow_ray.observability.zone import LocalZone

    try:
        return render_text(view_of(handle), LocalZone())
    except (PyWorkflowError, ValueError) as error:
        return f"{handle!r} can't be shown: {error}"


def watch(
    runs: RunHandle[Any] | Iterable[RunHandle[Any]], *, timeout: Duration | None = None, every: Duration = "500ms"
) -> None:
    """Show runs while they go on, until they have ended or wait for a person: `pw.watch(handle)`.

    In a notebook the cell's output is replaced, on a terminal a block is drawn over itself, elsewhere news come as
    lines; both on stderr. Ctrl-C stops watching, and no run. Raises nothing of what the runs raise.

    Args:
        runs: A handle, or several.
        timeout: How long to watch; None: as long as it takes.
        every: How often to look.

    Raises:
        TimeoutError: not all have ended in time; they go on.
    """
    from pyworkflow_ray.handle import RunHandle

    handles: Sequence[RunHandle[Any]] = [runs] if isinstance(runs, RunHandle) else list(dict.fromkeys(runs))
    deadline = None if timeout is None else time.monotonic() + parse_duration(timeout)
    surface = _surface()
    for rest, ended in looks(handles, max(0.05, parse_duration(every))):
        surface.show(rest, ended)
        if rest and deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{len(rest)} of {len(handles)} runs have not ended in time; they go on")


def looks(handles: Sequence[RunHandle[Any]], pause_s: float) -> Iterator[tuple[list[RunView], list[RunView]]]:
    """(runs that go on, runs that have ended), look after look, until all have ended or wait for a person.

    One that can't be read is left out, with a log line.
    """
    followed = list(handles)
    ended: list[RunView] = []
    while followed:
        rest: list[RunView] = []
        for handle in list(followed):
            try:
                view = view_of(handle)
            except (PyWorkflowError, ValueError) as error:
                log.warning("run %s is not followed any more: %s", handle.run_id, error)
                followed.remove(handle)
                continue
            if view.ended_at is None:
                rest.append(view)
            else:
                ended.append(view)
                followed.remove(handle)
        yield rest, ended
        if all(view.state == "paused" for view in rest):
            return
        time.sleep(pause_s)


def _surface() -> Any:
    from pyworkflow_ray.observability.live import Drawing

    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and getattr(shell, "kernel", None) is not None:
        return _NotebookOutput()
    return Drawing(sys.stderr)


class _NotebookOutput:
    """One output of a cell, replaced at each look that shows something else."""

    def __init__(self) -> None:
        self._display: Any = None
        self._last = ""

    def show(self, views: Sequence[RunView], ended: Sequence[RunView]) -> None:
        from IPython import display as ipython

        from pyworkflow_ray.observability.html import render_html
        from pyworkflow_ray.observability.lists import list_html, list_text
        from pyworkflow_ray.observability.live import block
        from pyworkflow_ray.observability.text import render_text
        from pyworkflow_ray.observability.zone import LocalZone

        if len(views) + len(ended) == 1:
            (view,) = [*views, *ended]
            html, text = render_html(view, LocalZone()), render_text(view, LocalZone())
        else:
            head = block(views, ended)[0]
            busy = [*views, *ended][:SHOWN]
            more = len(views) + len(ended) - len(busy)
            html = f"<div><pre>{escape(head)}</pre></div>{list_html(busy, more)}"
            text = f"{head}\n{list_text(busy, more)}"
        if text == self._last:
            return
        self._last = text
        data = {"text/html": html, "text/plain": text}
        if self._display is None:
            show: Any = ipython.display
            self._display = show(data, raw=True, display_id=True)
        else:
            self._display.update(data, raw=True)
