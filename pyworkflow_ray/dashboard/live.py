"""News of an open page by server-sent events: what of it is drawn otherwise than when it was last sent.

Called by `app`; calls what `pages` draws with. An event is JSON: the regions that differ, a line for screen readers and
the window's title. A page that takes long to look at is looked at the more seldom. A stream ends when its page is left,
or the server ends; browsers then come back by themselves.

Faults: a run that can't be read any more (told, and tried again), more pages than `MOST` (refused: the page stays as it
is), a reader that takes nothing (the server's own buffers fill, and it is waited for).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.responses import PlainTextResponse, Response, StreamingResponse

from pyworkflow_ray.dashboard.pages import Draw
from pyworkflow_ray.errors import PyWorkflowError

MOST: Final = 200
EVERY_S: Final = 1.0
SHARE: Final = 10  # times the time that a look takes is waited until the next one
MOST_S: Final = 30.0
PING_S: Final = 15.0
AGAIN_MS: Final = 2000


class Live:
    """All open streams. For one event loop."""

    def __init__(self) -> None:
        self._open = 0
        self._ending = asyncio.Event()

    def end(self) -> None:
        """The server ends: all streams do."""
        self._ending.set()

    def stream(self, draw: Draw, every_s: float = EVERY_S) -> Response:
        if self._open >= MOST:
            return PlainTextResponse("too many pages are open\n", 503)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(draw, every_s), media_type="text/event-stream", headers=headers)

    async def _events(self, draw: Draw, every_s: float) -> AsyncIterator[bytes]:
        self._open += 1
        sent: dict[str, str] = {}
        spoken_at = time.monotonic()
        try:
            yield f"retry: {AGAIN_MS}\n\n".encode()
            while not self._ending.is_set():
                pause_s, news = every_s, {}
                try:
                    screen = await draw()
                    now = {**screen.regions, " news": screen.news, " title": screen.title}
                    news = {name: text for name, text in now.items() if sent.get(name) != text}
                    sent, pause_s = now, max(every_s, min(MOST_S, SHARE * screen.took_s))
                except (PyWorkflowError, ValueError, OSError) as error:
                    text = f"can't be read: {' '.join(str(error).split())}"
                    news, sent = ({" news": text} if sent.get(" news") != text else {}), {" news": text}
                if news:
                    yield _event(news)
                    spoken_at = time.monotonic()
                elif time.monotonic() - spoken_at > PING_S:
                    yield b": still here\n\n"
                    spoken_at = time.monotonic()
                await self._rest(pause_s)
        finally:
            self._open -= 1

    async def _rest(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._ending.wait(), seconds)
        except TimeoutError:
            return


def _event(news: dict[str, str]) -> bytes:
    told: dict[str, Any] = {"regions": {name: text for name, text in news.items() if not name.startswith(" ")}}
    told |= {name.strip(): text for name, text in news.items() if name.startswith(" ")}
    return f"data: {json.dumps(told)}\n\n".encode()
