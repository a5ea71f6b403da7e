"""What a person does from a page: one handler for runs, one for breakers. The api does it, through `cluster`.

Called by `app`, once `guard` has let the form in. A form is carried out once, however often it is sent: a second press
of Rerun is given the first one's run. What is refused is said on a page of its own, with the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from starlette.responses import RedirectResponse

from pyworkflow_ray.dashboard.cluster import Away
from pyworkflow_ray.dashboard.deeds import DEEDS, STEERS
from pyworkflow_ray.dashboard.pages import run_id_of
from pyworkflow_ray.errors import PyWorkflowError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.requests import Request
    from starlette.responses import Response

    from pyworkflow_ray.dashboard.cluster import Cluster
    from pyworkflow_ray.dashboard.looks import Looks
    from pyworkflow_ray.dashboard.parts import Parts

REMEMBERED: Final = 500
SEEN_S: Final = 2.0  # how long a page is held back for the deed to show on it
SEEN_LOOK_S: Final = 0.1
MAX_REASON: Final = 500


class Actions:
    """See the module. For one event loop."""

    def __init__(self, looks: Looks, cluster: Cluster, parts: Parts) -> None:
        self._looks = looks
        self._cluster = cluster
        self._parts = parts
        self._forms: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()

    async def on_run(self, request: Request) -> Response:
        run_id, name = run_id_of(request), request.path_params["deed"]
        back = f"/runs/{run_id}"
        if name not in DEEDS:
            return self._refused(404, f"There is no deed {name!r}.", back)
        given = {"run_id": run_id}
        if DEEDS[name].reason:
            given["reason"] = request.state.form.get("reason", "").strip()[:MAX_REASON]
        before = (await self._looks.run(run_id)).seen.events

        async def deed() -> str:
            told = str(await self._cluster.call(name, given))
            if name != "rerun":
                await self._seen(run_id, before)
            self._looks.forget()
            return f"/runs/{told}?told={name}"

        return await self._once(request, deed(), back)

    async def on_breaker(self, request: Request) -> Response:
        how, name = request.path_params["how"], request.state.form.get("name", "")
        back = "/breakers"
        if how not in STEERS or not name:
            return self._refused(404, f"There is no deed {how!r} for a breaker {name!r}.", back)

        async def deed() -> str:
            await self._cluster.call("steer", {"name": name, "how": how})
            self._looks.forget()
            return f"/breakers?told={quote(how)}"

        return await self._once(request, deed(), back)

    async def _once(self, request: Request, deed: Awaitable[str], back: str) -> Response:
        """Carry the form out, unless it has been: then its outcome again."""
        form = request.state.form.get("once", "")
        key = f"{request.state.session.id} {request.url.path} {form} {request.state.form.get('name', '')}"
        done = self._forms.get(key) if form else None
        if done is None:
            done = asyncio.ensure_future(deed)
            self._forms[key] = done
            while len(self._forms) > REMEMBERED:
                self._forms.popitem(last=False)
        else:
            _close(deed)
        try:
            return RedirectResponse(await asyncio.shield(done), 303)
        except Away as error:
            self._forms.pop(key, None)
            if error.asked:
                return self._refused(
                    503, f"It is not known whether it was done: look before you try again. {error}", back
                )
            return self._refused(503, f"Nothing was done: this needs Ray. {error}", back)
        except PyWorkflowError as error:
            self._forms.pop(key, None)
            return self._refused(409, f"Refused: {error}", back)

    async def _seen(self, run_id: str, before: int) -> None:
        """Wait a little for the deed to show in the run's log: a page without scripts is not drawn again."""
        give_up_at = time.monotonic() + SEEN_S
        while time.monotonic() < give_up_at:
            self._looks.forget()
            try:
                if (await self._looks.run(run_id)).seen.events != before:
                    return
            except (PyWorkflowError, OSError, ValueError):
                return  # the deed is done all the same; the page says what is wrong with the run
            await asyncio.sleep(SEEN_LOOK_S)

    def _refused(self, status: int, text: str, back: str) -> Response:
        return self._parts.page("message.html", status, title="Refused", texts=[text], commands=[], back=back)


def _close(deed: Any) -> None:
    deed.close()
