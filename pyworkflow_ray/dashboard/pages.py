"""The pages: the list of runs, one run, the breakers. Each as a whole, and as the regions that `live` sends again.

Called by `app` and `live`; calls `looks` for what is so, `parts` for how it looks, `cluster` for breakers that live.
Faults: an unknown run (404), a damaged one (500, naming run and file, and what to do), a filter that is none (400).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from pyworkflow_ray.breaker import BreakerSnapshot, BreakerState
from pyworkflow_ray.dashboard import parts
from pyworkflow_ray.dashboard.cluster import Away
from pyworkflow_ray.dashboard.deeds import DEEDS, STEERS
from pyworkflow_ray.dashboard.looks import Look
from pyworkflow_ray.dashboard.parts import Breakers, Form, Parts, Regions
from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError, RunNotFoundError
from pyworkflow_ray.ids import check_run_id
from pyworkflow_ray.observability.words import GLYPHS
from pyworkflow_ray.reading import Filter

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from pyworkflow_ray.dashboard.cluster import Cluster
    from pyworkflow_ray.dashboard.looks import Looks

LIMIT: Final = 50
STATES: Final = (
    "retrying", "stuck", "waiting", "pending", "running", "parked", "paused", "completed", "failed", "cancelled",
)  # fmt: skip
SPANS: Final = ("15m", "1h", "1d", "7d", "30d")
BREAKERS_S: Final = 3.0  # then what the storage keeps is shown: an actor that hangs is waited for elsewhere
LIST_S: Final = 2.0  # a storage whose runs were never listed is read as a whole, once: the page says so meanwhile


@dataclass(frozen=True)
class Screen:
    """What a page shows at one moment. news: for a screen reader. title: of the window. took_s: how long it took."""

    regions: Regions
    news: str
    title: str
    took_s: float


Draw = Callable[[], Awaitable[Screen]]


class BadRequest(ValueError):
    """The address asks for what there can't be; the message says what."""


class Pages:
    """See the module."""

    def __init__(self, looks: Looks, cluster: Cluster, drawn: Parts) -> None:
        self._looks = looks
        self._cluster = cluster
        self._parts = drawn

    # Runs ---------------------------------------------------------------------------------------------------------

    async def runs(self, request: Request) -> Response:
        screen = await self.draw_runs(request)()
        asked = request.query_params
        return self._parts.page(
            "runs.html",
            title="Runs",
            screen=screen,
            live="/live" + (f"?{request.url.query}" if request.url.query else ""),
            states=STATES,
            chosen=set(asked.getlist("state")),
            spans=SPANS,
            asked={name: asked.get(name, "") for name in ("text", "workflow", "since")},
        )

    def draw_runs(self, request: Request) -> Draw:
        """Raises:
        BadRequest: a filter is none.
        """
        asked = request.query_params
        wanted, before = wanted_of(request)
        kept = [(name, value) for name, value in asked.multi_items() if name != "before" and value]

        async def draw() -> Screen:
            try:
                look = await asyncio.wait_for(self._looks.listing(wanted, LIMIT, before), LIST_S)
            except TimeoutError:
                return Screen(self._parts.list_later(), "the list is being made", "Runs", 0.0)
            except (RunNotFoundError, ConfigurationError) as error:
                raise BadRequest(f"before={before}: {error}") from None
            listed = look.seen
            older = "/?" + urlencode([*kept, ("before", listed.cursor)]) if listed.more and listed.cursor else ""
            newest = (f"/?{urlencode(kept)}" if kept else "/") if before else None
            regions = self._parts.list_regions(listed, older, newest)
            return Screen(regions, parts.news_of_list(listed), "Runs", look.took_s)

        return draw

    # One run ------------------------------------------------------------------------------------------------------

    async def run(self, request: Request) -> Response:
        self._cluster.look()
        run_id = run_id_of(request)
        screen = await self.draw_run(request)()
        told = DEEDS.get(request.query_params.get("told", ""))
        every = "all" in request.query_params
        return self._parts.page(
            "run.html",
            title=screen.title,
            screen=screen,
            run_id=run_id,
            live=f"/runs/{run_id}/live" + ("?all=1" if every else ""),
            told=told.told if told is not None else "",
        )

    def draw_run(self, request: Request) -> Draw:
        run_id, every = run_id_of(request), "all" in request.query_params
        form = Form(request.state.session.csrf, secrets.token_hex(8))

        async def draw() -> Screen:
            look = await self._looks.run(run_id)
            view = look.seen
            names = {step.breaker for step in view.steps if step.breaker}
            breakers = await self._breakers(names) if names else Breakers(())
            reach = self._cluster.reach

            def regions() -> Regions:
                return self._parts.run_regions(view, form=form, every=every, reach=reach, breakers=breakers)

            drawn = await self._looks.in_thread(regions)
            title = f"{GLYPHS[view.state]} {view.run_id}"
            return Screen(drawn, parts.news_of_run(view), title, look.took_s)

        return draw

    # Breakers -----------------------------------------------------------------------------------------------------

    async def breakers(self, request: Request) -> Response:
        self._cluster.look()
        screen = await self.draw_breakers(request)()
        told = STEERS.get(request.query_params.get("told", ""))
        return self._parts.page(
            "breakers.html",
            title="Circuit breakers",
            screen=screen,
            live="/breakers/live",
            told=told.told if told is not None else "",
        )

    def draw_breakers(self, request: Request) -> Draw:
        form = Form(request.state.session.csrf, secrets.token_hex(8))

        async def draw() -> Screen:
            found = await self._breakers()
            regions = self._parts.breaker_regions(found, form=form, reach=self._cluster.reach)
            return Screen(regions, parts.news_of_breakers(found), "Circuit breakers", 0.0)

        return draw

    async def _breakers(self, names: set[str] | None = None) -> Breakers:
        """Those of the cluster where one is connected, else as the storage keeps them. names: only these."""
        if self._cluster.reach.state == "connected":
            try:
                asked = self._looks.once(("cluster",), lambda: self._cluster.call("list_breakers", {}))
                look: Look[Any] = await asyncio.wait_for(asked, BREAKERS_S)
                told = look.seen
                found = [BreakerSnapshot(**{**one, "state": BreakerState(one["state"])}) for one in told["found"]]
                return Breakers([one for one in found if names is None or one.name in names], silent=told["silent"])
            except (Away, PyWorkflowError, TimeoutError):
                pass  # it is gone since: what is kept is what can be shown
        kept = [one for one in (await self._looks.kept_breakers()).seen if names is None or one[0].name in names]
        return Breakers([one for one, _ in kept], [age_s for _, age_s in kept], kept=True)

    # Errors -------------------------------------------------------------------------------------------------------

    async def not_found(self, request: Request, error: Exception) -> Response:
        status, text = getattr(error, "status_code", 404), str(error)
        if not isinstance(error, PyWorkflowError):
            text = "There is no such page." if status == 404 else "That can't be done here."
        return self._parts.page("message.html", status, title="Not found", texts=[text], commands=[], back="/")

    async def bad_request(self, request: Request, error: Exception) -> Response:
        return self._parts.page("message.html", 400, title="Not understood", texts=[str(error)], commands=[], back="/")

    async def unreadable(self, request: Request, error: Exception) -> Response:
        commands = ["pyworkflow-ray storage verify"]
        return self._parts.page(
            "message.html", 500, title="Can't be read", texts=[str(error)], commands=commands, back="/"
        )


def wanted_of(request: Request) -> tuple[Filter, str | None]:
    """The filter that an address asks for, and where its page begins."""
    asked = request.query_params
    states = [state for state in asked.getlist("state") if state]
    for state in states:
        if state not in STATES:
            raise BadRequest(f"state={state} is no state: one of {', '.join(STATES)}")
    since = asked.get("since", "").strip()
    try:
        since_s = parse_duration(since) if since else None
    except (ValueError, TypeError) as error:
        raise BadRequest(f"since={since}: {error}") from None
    wanted = Filter(
        frozenset(states), asked.get("workflow", "").strip() or None, since_s, text=asked.get("text", "").strip()[:200]
    )
    return wanted, asked.get("before") or None


def run_id_of(request: Request) -> str:
    """Raises:
    RunNotFoundError: it is no id that a run can have.
    """
    run_id = request.path_params["run_id"]
    try:
        return check_run_id(run_id)
    except ConfigurationError as error:
        raise RunNotFoundError(str(error), run_id=run_id) from None
