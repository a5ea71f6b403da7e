"""A dashboard over a real storage, asked by HTTP without a socket. No Ray; the storage is that of tests/cli."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pyworkflow_ray.dashboard.app import Dashboard
from pyworkflow_ray.dashboard.guard import Rules
from pyworkflow_ray.storage.breaker_states import BreakerStates
from tests.cli.conftest import Shop, empty, invoke, shop

__all__ = ["empty", "invoke", "shop"]

NOBODY = "127.0.0.1:1"  # an address at which no Ray answers

Open = Callable[..., TestClient]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open a dashboard: by default one that only shows, for one that may act looks for a Ray with another process."""
    with ExitStack() as stack:

        def make(shop: Shop | Path, *, base_url: str = "http://localhost", **rules: Any) -> TestClient:
            root = shop if isinstance(shop, Path) else shop.root
            app = Dashboard(root, dt.UTC, Rules(**{"read_only": True, **rules}), NOBODY)
            client = TestClient(app, base_url=base_url, follow_redirects=False)
            return stack.enter_context(client)

        yield make


@pytest.fixture
def page(shop: Shop, opened: Open) -> Callable[[str], str]:
    """Get a page of the four runs of tests/cli."""
    client = opened(shop)

    def get(path: str) -> str:
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.text

    return get


def keep_breaker(shop: Shop, name: str, *states: tuple[str | None, str, float | None, str]) -> None:
    """Leave the states of a breaker in the storage, as its actor does: (key, state, rest of the open time, reason)."""
    saved: list[tuple[str | None, dict[str, Any]]] = [
        (
            key,
            {
                "version": 3, "generation": 2, "state": state, "failures": 5, "open_for_s": rest_s, "permits": [],
                "reason": reason, "successes": 0, "failed_probes": 0, "configured": None,
            },
        )
        for key, state, rest_s, reason in states
    ]  # fmt: skip
    BreakerStates(str(shop.root), name).save(saved, time.time())
