"""News of open pages: what is sent, what is not, and how a stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest

from pyworkflow_ray.dashboard import live
from pyworkflow_ray.dashboard.live import Live
from pyworkflow_ray.dashboard.pages import Screen
from pyworkflow_ray.errors import StorageError


def screen(news: str = "a run", title: str = "t", **regions: str) -> Screen:
    return Screen(regions, news, title, 0.0)


class Drawer:
    """Draws what it is given, one after another, and then the last for ever."""

    def __init__(self, *shown: Screen | Exception) -> None:
        self._shown: Iterator[Screen | Exception] = iter(shown)
        self._last = shown[-1]
        self.asked = 0

    async def __call__(self) -> Screen:
        self.asked += 1
        one = next(self._shown, self._last)
        if isinstance(one, Exception):
            raise one
        return one


async def told(stream: Any, count: int) -> list[dict[str, Any]]:
    """So many events of a stream."""
    found: list[dict[str, Any]] = []
    async for chunk in cast("AsyncIterator[bytes]", stream.body_iterator):
        if chunk.startswith(b"data: "):
            assert chunk.endswith(b"\n\n")
            assert chunk.count(b"\n") == 2  # one line of data, whatever is in it
            found.append(json.loads(chunk[6:]))
        if len(found) == count:
            break
    return found


async def test_only_what_is_drawn_otherwise_is_sent() -> None:
    drawer = Drawer(
        screen(steps="one\n\ndata: {}", acts="x"),
        screen(steps="one\n\ndata: {}", acts="x"),
        screen(steps="two", acts="x"),
        screen("ended", steps="two", acts="x"),
    )
    first, second, third = await told(Live().stream(drawer, 0.0), 3)
    assert first == {"regions": {"steps": "one\n\ndata: {}", "acts": "x"}, "news": "a run", "title": "t"}
    assert second == {"regions": {"steps": "two"}}
    assert third == {"regions": {}, "news": "ended"}
    assert drawer.asked == 4


async def test_a_run_that_can_t_be_read_is_told_once_and_tried_again() -> None:
    broken = StorageError("runs/x: record 3\nfails its check", path="x")
    drawer = Drawer(screen(steps="one"), broken, broken, broken, screen(steps="one"))
    first, second, third = await told(Live().stream(drawer, 0.0), 3)
    assert second == {"regions": {}, "news": "can't be read: runs/x: record 3 fails its check"}
    assert third == first


async def test_streams_end_with_the_server() -> None:
    alive = Live()
    response = alive.stream(Drawer(screen(steps="one")), 3600.0)

    async def all_of_it() -> list[bytes]:
        return [chunk async for chunk in cast("AsyncIterator[bytes]", response.body_iterator)]

    reading = asyncio.ensure_future(all_of_it())
    await asyncio.sleep(0)
    alive.end()
    assert len(await asyncio.wait_for(reading, 10)) <= 2


async def test_a_page_that_takes_long_is_looked_at_the_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    alive = Live()

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            alive.end()

    monkeypatch.setattr(alive, "_rest", rest)
    slow = Screen({}, "a", "t", took_s=0.7)
    await told(alive.stream(Drawer(screen(), slow), 1.0), 9)
    assert rests == [1.0, 7.0]


async def test_too_many_open_pages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST", 1)
    alive = Live()
    first = alive.stream(Drawer(screen()), 0.0)
    await told(first, 1)
    assert alive.stream(Drawer(screen())).status_code == 503
    await cast("Any", first.body_iterator).aclose()
    assert alive.stream(Drawer(screen())).status_code == 200
