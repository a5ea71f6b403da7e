"""Looks at the storage: shared while they are fresh, never lost because they took long."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import pytest

from pyworkflow_ray.dashboard import looks
from pyworkflow_ray.dashboard.looks import Looks
from pyworkflow_ray.errors import StorageError
from tests.cli.conftest import Shop
from tests.dashboard.conftest import Open


async def test_who_asks_meanwhile_is_given_the_same_answer(tmp_path: Path) -> None:
    begun, go_on = 0, asyncio.Event()

    async def look() -> int:
        nonlocal begun
        begun += 1
        await go_on.wait()
        return begun

    seen = Looks(tmp_path, dt.UTC)
    asked = [asyncio.ensure_future(seen.once("x", look)) for _ in range(3)]
    await asyncio.sleep(0)
    asked[0].cancel()  # whoever leaves takes nothing from the others
    go_on.set()
    assert [(await one).seen for one in asked[1:]] == [1, 1]
    assert (await seen.once("x", look)).seen == 1  # fresh
    seen.forget()
    assert (await seen.once("x", look)).seen == 2


async def test_an_answer_is_as_fresh_as_its_end_however_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(looks.time, "monotonic", lambda: now)
    begun = 0

    async def look() -> int:
        nonlocal now, begun
        begun += 1
        now += 100 * looks.FRESH_S
        return begun

    seen = Looks(tmp_path, dt.UTC)
    assert [(await seen.once("x", look)).seen for _ in range(2)] == [1, 1]
    now += 2 * looks.FRESH_S
    assert (await seen.once("x", look)).seen == 2


async def test_an_error_goes_to_all_who_asked_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(looks.time, "monotonic", lambda: now)
    errors = [StorageError("damaged", path="x")]

    async def look() -> str:
        if errors:
            raise errors.pop()
        return "mended"

    seen = Looks(tmp_path, dt.UTC)
    both = await asyncio.gather(*(seen.once("x", look) for _ in range(2)), return_exceptions=True)
    assert [str(one) for one in both] == ["damaged", "damaged"]
    now += 2 * looks.FRESH_S
    assert (await seen.once("x", look)).seen == "mended"


async def test_few_looks_are_kept(tmp_path: Path) -> None:
    async def look() -> int:
        return 1

    seen = Looks(tmp_path, dt.UTC)
    for number in range(5 * looks.KEPT):
        await seen.once(number, look)
    assert len(seen._shared) <= looks.KEPT + 1


def test_a_list_that_takes_long_is_promised(shop: Shop, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyworkflow_ray.dashboard.pages.LIST_S", 0.0)
    answer = opened(shop).get("/")
    assert answer.status_code == 200
    assert "are being read" in answer.text
