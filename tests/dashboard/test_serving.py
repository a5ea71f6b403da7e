"""The command as a person starts it: a server on a socket, an open page that hears of an event, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pyworkflow_ray.engine import events as ev
from tests.cli.conftest import Shop, payload

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(shop: Shop, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The dashboard's command on a free port: the address that it says, and its process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyworkflow_ray", "dashboard", "--storage", str(shop.root), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, process.communicate()[1]
        yield url, process
    finally:
        process.kill()
        process.communicate()


def events_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line[6:])


def test_an_open_page_hears_of_events_and_ctrl_c_ends_it(shop: Shop) -> None:
    storage = shop.storage
    with serving(shop, "--read-only") as (url, process), httpx.Client(base_url=url, timeout=60) as client:
        assert re.fullmatch(r"http://localhost:\d+/", url)
        with client.stream("GET", "/runs/order-40/live") as stream:
            news = events_of(stream.iter_lines())
            assert next(news)["news"] == "order-40: parked"
            journal, _ = storage.activate("order-40", shop.lease.id)
            at = ev.RunCompleted(result=payload("done")).model_copy(update={"seq": 5, "at": 2e9})
            started = ev.RunActivated(epoch=1, cause="wake").model_copy(update={"seq": 4, "at": 2e9})
            journal.append([started, at]).result(timeout=10)
            journal.close()
            told = next(one for one in news if "news" in one)
            assert told["news"] == "order-40: completed"
            assert "verdict" in told["regions"]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0  # though the page is still open
        assert "Traceback" not in process.communicate()[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "203.0.113.1"), "can't listen at 203.0.113.1:0"),
        (("--token", "short"), "5 characters: give 16 or more"),
    ],
)
def test_what_can_t_be_served_is_one_line(shop: Shop, invoke: Any, options: tuple[str, ...], says: str) -> None:
    result = invoke("dashboard", "--storage", shop.root, "--port", "0", *options)
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_missing_extra_names_what_to_install(shop: Shop, invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyworkflow_ray.cli.dashboard.NEEDED", ("jinja2", "no_such_library"))
    result = invoke("dashboard", "--storage", shop.root)
    assert result.exit_code == 2
    assert result.stderr == "error: the dashboard needs no_such_library: pip install 'pyworkflow-ray[dashboard]'\n"
