"""The demo as a user runs it: a process of its own, judged from the files that it leaves behind."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyworkflow_ray.demo.orders import ORDERS_FILE

pytestmark = pytest.mark.ray

KEYS = "orders completed failed retries recoveries kills requests charges charged_twice lost seconds".split()


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pyworkflow_ray", "demo", *arguments]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_orders_are_charged_once_though_everything_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = demo("--dir", str(folder), "--json", "--orders", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    assert [key for key in figures if key in KEYS] == KEYS
    assert figures["orders"] == 120
    assert figures["charged_twice"] == figures["lost"] == 0
    assert min(figures["kills_by_kind"].values()) > 0
    assert figures["recoveries"] > 0
    assert figures["retries"] > 0

    # The ledger itself, asked without any code of the demo.
    with ORDERS_FILE.open(newline="", encoding="utf-8") as stream:
        amounts = {row["order_id"]: row["amount"] for row in list(csv.DictReader(stream))[:120]}
    db = sqlite3.connect(folder / "ledger.sqlite3")
    charges = db.execute("select order_id, count(*), sum(amount) from charges group by 1").fetchall()
    requests, keys = db.execute("select count(*), count(distinct key) from requests").fetchone()
    receipts = db.execute("select count(*), count(distinct order_id) from receipts").fetchone()
    db.close()
    assert all(count == 1 and amount == float(amounts[order]) for order, count, amount in charges)
    assert len(charges) == figures["completed"] == figures["charges"]
    assert receipts == (figures["completed"], figures["completed"])
    assert requests == figures["requests"] > keys


def test_a_directory_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite3").touch()
    done = demo("--dir", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert done.stdout == ""
