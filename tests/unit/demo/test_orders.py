from __future__ import annotations

import io
from pathlib import Path

import pytest

from pyworkflow_ray.demo.orders import ORDERS_FILE, read_orders, write_orders


def test_committed_orders_are_what_the_generator_writes() -> None:
    stream = io.StringIO()
    write_orders(stream)
    assert ORDERS_FILE.read_text(encoding="utf-8") == stream.getvalue()


def test_orders_are_a_few_hundred_with_distinct_ids() -> None:
    rows = read_orders()
    assert len(rows) == 300
    assert len({row["order_id"] for row in rows}) == 300
    assert {row["currency"] for row in rows} >= {"EUR", "GBP", "JPY", "USD"}


def test_limit_takes_the_first_rows() -> None:
    assert read_orders(limit=20) == read_orders()[:20]


def test_an_order_that_stands_twice_is_refused(tmp_path: Path) -> None:
    lines = ORDERS_FILE.read_text(encoding="utf-8").splitlines()
    (tmp_path / "orders.csv").write_text("\n".join([*lines[:3], lines[1]]), encoding="utf-8")
    with pytest.raises(ValueError, match="A0001 stands twice"):
        read_orders(tmp_path / "orders.csv")


def test_a_file_without_the_columns_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("order_id,customer\nA1,Ada\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column email, street"):
        read_orders(tmp_path / "orders.csv")
