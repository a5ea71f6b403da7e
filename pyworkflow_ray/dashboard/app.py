"""The dashboard as an ASGI application: which address leads where. Made by `server` and by tests.

Calls `pages`, `actions` and `live`; `guard` stands before all of them.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pyworkflow_ray import __version__
from pyworkflow_ray.dashboard.actions import Actions
from pyworkflow_ray.dashboard.cluster import Cluster
from pyworkflow_ray.dashboard.guard import Guard, Rules
from pyworkflow_ray.dashboard.live import Live
from pyworkflow_ray.dashboard.looks import Looks
from pyworkflow_ray.dashboard.pages import BadRequest, Pages
from pyworkflow_ray.dashboard.parts import HERE, Parts
from pyworkflow_ray.errors import PyWorkflowError, RunNotFoundError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Dashboard:
    """The application, callable as ASGI. `end_streams` lets open pages go when the server ends."""

    def __init__(self, root: Path | str, zone: dt.tzinfo, rules: Rules, address: str | None = None) -> None:
        parts = Parts(str(root), zone, __version__)
        cluster = Cluster(str(root), address, off=rules.read_only)
        looks = Looks(root, zone)
        pages, actions = Pages(looks, cluster, parts), Actions(looks, cluster, parts)
        self._live = live = Live()

        async def live_runs(request: Request) -> Response:
            return live.stream(pages.draw_runs(request), every_s=2.0)

        async def live_run(request: Request) -> Response:
            return live.stream(pages.draw_run(request))

        async def live_breakers(request: Request) -> Response:
            return live.stream(pages.draw_breakers(request), every_s=2.0)

        @contextlib.asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            looks.warm()
            yield
            await cluster.close()

        self.cluster = cluster
        starlette = Starlette(
            routes=[
                Route("/", pages.runs),
                Route("/live", live_runs),
                Route("/runs/{run_id}", pages.run),
                Route("/runs/{run_id}/live", live_run),
                Route("/runs/{run_id}/{deed}", actions.on_run, methods=["POST"]),
                Route("/breakers", pages.breakers),
                Route("/breakers/live", live_breakers),
                Route("/breakers/{how}", actions.on_breaker, methods=["POST"]),
                Mount("/static", StaticFiles(directory=HERE / "static")),
            ],
            exception_handlers={
                HTTPException: pages.not_found,
                RunNotFoundError: pages.not_found,
                BadRequest: pages.bad_request,
                PyWorkflowError: pages.unreadable,
            },
            lifespan=lifespan,
        )
        self._app = Guard(starlette, rules, parts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)

    def end_streams(self) -> None:
        self._live.end()
