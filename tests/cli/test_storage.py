"""`storage compact|verify` and `sql` over a real storage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

Invoke = Callable[..., Any]


def test_verify_reads_everything(invoke: Invoke, shop: Any) -> None:
    result = invoke("storage", "verify", "--storage", shop.root)
    assert (result.exit_code, result.stdout) == (0, "4 runs read, 0 with a torn tail, 0 errors\n")


def test_verify_exits_1_and_names_what_is_damaged(invoke: Invoke, shop: Any) -> None:
    path = shop.journal_of("order-41")
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(data)
    result = invoke("storage", "verify", "--storage", shop.root)
    assert (result.exit_code, result.stdout) == (1, "4 runs read, 0 with a torn tail, 1 error\n")
    assert str(path.parent) in result.stderr
    report = json.loads(invoke("storage", "verify", "--json", "--storage", shop.root).stdout)
    assert [d["run_id"] for d in report["damaged"]] == ["order-41"]


def test_verify_finds_a_damaged_payload(invoke: Invoke, empty: Any) -> None:
    from pyworkflow_ray.engine import events as ev

    digest = empty.storage.put_blob(b"a large result")
    spilled = ev.Payload(enc="json", ref=digest, size=14)
    empty.run("r", (5, ev.RunActivated(epoch=0)), (4, ev.RunCompleted(result=spilled)), finish=True)
    assert invoke("storage", "verify", "--storage", empty.root).exit_code == 0
    blob = next(empty.root.glob(f"blobs/*/{digest}"))
    blob.write_bytes(b"b large result")
    result = invoke("storage", "verify", "--storage", empty.root)
    assert result.exit_code == 1
    assert str(blob) in result.stderr


def test_compacted_runs_are_shown_as_before(invoke: Invoke, shop: Any) -> None:
    before = json.loads(invoke("runs", "show", "order-39", "--json", "--storage", shop.root).stdout)
    result = invoke("storage", "compact", "--storage", shop.root)
    assert result.exit_code == 0
    assert result.stdout.startswith("1 run, 5 events moved into ")
    assert not list(shop.root.glob("runs/*/order-39/*.journal"))
    after = json.loads(invoke("runs", "show", "order-39", "--json", "--storage", shop.root).stdout)
    assert {**after, "now": ""} == {**before, "now": ""}
    assert len(json.loads(invoke("runs", "list", "--json", "--storage", shop.root).stdout)) == 4
    assert invoke("storage", "verify", "--storage", shop.root).exit_code == 0


def test_verify_finds_a_damaged_checkpoint(invoke: Invoke, shop: Any) -> None:
    invoke("storage", "compact", "--storage", shop.root)
    path = next(shop.root.glob("checkpoints/date=*/*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = invoke("storage", "verify", "--storage", shop.root)
    assert result.exit_code == 1
    assert path.name in result.stderr


def test_sql_answers_over_the_runs(invoke: Invoke, shop: Any) -> None:
    query = "select status, count(*) as n from runs group by 1 order by 1"
    result = invoke("sql", query, "--json", "--storage", shop.root)
    assert json.loads(result.stdout) == [
        {"status": "completed", "n": 1},
        {"status": "failed", "n": 1},
        {"status": "parked", "n": 1},
        {"status": "running", "n": 1},
    ]
    table = invoke("sql", query, "--storage", shop.root).stdout.splitlines()
    assert table[0].split() == ["status", "n"]
    assert table[-1] == "4 rows"


@pytest.mark.parametrize("query", ["selec 1", "drop table runs", "select nosuch from runs"])
def test_wrong_sql_is_usage(invoke: Invoke, shop: Any, query: str) -> None:
    result = invoke("sql", query, "--storage", shop.root)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
