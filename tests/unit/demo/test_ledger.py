from __future__ import annotations

import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from pyworkflow_ray.demo.ledger import KeyReusedError, Ledger, read_ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_a_key_charges_once(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.charge("k1", "A1", Decimal("19.90"))
    assert not ledger.charge("k1", "A1", Decimal("19.90"))
    proof = read_ledger(tmp_path / "ledger.db", {"A1": "19.90"}, [])
    assert proof.charges == 1
    assert proof.holds


@pytest.mark.parametrize(("order", "amount"), [("A2", "19.90"), ("A1", "20")])
def test_a_key_used_for_another_charge_is_refused(ledger: Ledger, order: str, amount: str) -> None:
    ledger.charge("k1", "A1", Decimal("19.90"))
    with pytest.raises(KeyReusedError):
        ledger.charge("k1", order, Decimal(amount))


def test_two_keys_charge_twice_and_the_proof_says_so(ledger: Ledger, tmp_path: Path) -> None:
    ledger.charge("k1", "A1", Decimal("5"))
    ledger.charge("k2", "A1", Decimal("5"))
    proof = read_ledger(tmp_path / "ledger.db", {"A1": "5"}, [])
    assert proof.charged_twice == ("A1",)
    assert not proof.holds


def test_a_completed_order_without_a_charge_and_a_failed_one_with_one_are_found(ledger: Ledger, tmp_path: Path) -> None:
    ledger.charge("k1", "A1", Decimal("5"))
    proof = read_ledger(tmp_path / "ledger.db", {"A2": "7"}, ["A1"])
    assert (proof.uncharged, proof.overcharged) == (("A2",), ("A1",))
    assert not proof.holds


def test_a_wrong_amount_is_found(ledger: Ledger, tmp_path: Path) -> None:
    ledger.charge("k1", "A1", Decimal("50"))
    assert read_ledger(tmp_path / "ledger.db", {"A1": "5.0"}, []).wrong_amount == ("A1",)


def test_requests_with_a_key_seen_before_count_as_repeated(ledger: Ledger, tmp_path: Path) -> None:
    assert [ledger.request(key, "A1") for key in ("k1", "k1", "k1")] == [1, 2, 3]
    ledger.request("k2", "A2")
    proof = read_ledger(tmp_path / "ledger.db", {}, [])
    assert (proof.requests, proof.repeated) == (4, 2)


def test_the_tables_have_the_promised_columns(ledger: Ledger, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.db")
    columns = {
        table: [row[1] for row in db.execute(f"pragma table_info({table})")] for table in ("requests", "charges")
    }
    assert columns == {"requests": ["key", "order_id", "at"], "charges": ["key", "order_id", "amount"]}
    db.close()


def test_a_charge_outlives_the_process_that_made_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from decimal import Decimal; from pathlib import Path\n"
        "from pyworkflow_ray.demo.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1])).charge('k1', 'A1', Decimal(5)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ledger.db")], check=False)
    assert done.returncode == -9
    assert read_ledger(tmp_path / "ledger.db", {"A1": "5"}, []).charges == 1
