"""What the services of the demo did, in SQLite: written by them alone, read afterwards as the proof.

Called by `services` (which writes) and `main` (which reads it when all is done); calls nothing. Each write is durable
before it returns (`synchronous=FULL`). `charges` is unique by idempotency key only: a client that asks twice with two
keys does charge an order twice, and `read_ledger` finds it.

    requests(key, order_id, at)         each request the payment service got, before it decided what to do with it
    charges(key, order_id, amount)      each charge made
    reservations(key, order_id, sku, quantity, source)     receipts(key, order_id, email)

Faults to expect: sqlite3.OperationalError where the disk is full or the file is no database.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

_TABLES = """
create table if not exists requests(key text not null, order_id text not null, at real not null);
create table if not exists charges(key text primary key, order_id text not null, amount numeric not null);
create table if not exists reservations(
    key text primary key, order_id text not null, sku text not null, quantity integer not null, source text not null);
create table if not exists receipts(key text primary key, order_id text not null, email text not null);
"""


class KeyReusedError(ValueError):
    """An idempotency key came back with another order or amount: the first use stands, the second is refused."""


class Ledger:
    """The books of the services. Any thread may call; one writes at a time."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")
        self._db.executescript(_TABLES)

    def request(self, key: str, order_id: str) -> int:
        """Note a request to the payment service; its number among those for the order, from 1."""
        with self._lock:
            self._db.execute("insert into requests values (?, ?, ?)", (key, order_id, time.time()))
            row = self._db.execute("select count(*) from requests where order_id = ?", (order_id,)).fetchone()
        return int(row[0])

    def charge(self, key: str, order_id: str, amount: Decimal) -> bool:
        """Charge an order; False where this key has charged it already (nothing is charged then).

        Raises:
            KeyReusedError: the key belongs to another charge.
        """
        return self._once("charges", key, (order_id, str(amount)), (order_id, float(amount)))

    def reserve(self, key: str, order_id: str, sku: str, quantity: int, source: str) -> bool:
        """Set goods aside; False where this key has done so already."""
        return self._once("reservations", key, (order_id, sku, quantity, source))

    def receipt(self, key: str, order_id: str, email: str) -> bool:
        """Send a receipt; False where this key has sent it already."""
        return self._once("receipts", key, (order_id, email))

    def _once(self, table: str, key: str, values: tuple[Any, ...], stored: tuple[Any, ...] | None = None) -> bool:
        marks = ", ".join("?" * (len(values) + 1))
        with self._lock:
            row = self._db.execute(f"select * from {table} where key = ?", (key,)).fetchone()
            if row is None:
                self._db.execute(f"insert into {table} values ({marks})", (key, *values))
                return True
        if tuple(row[1:]) != (stored or values):
            raise KeyReusedError(f"idempotency key {key} belongs to {table} {row[1:]}, not {values}")
        return False

    def close(self) -> None:
        with self._lock:
            self._db.close()


@dataclass(frozen=True)
class Proof:
    """What the ledger says, held against the orders that completed and those that failed.

    requests: requests to the payment service. repeated: those that came with a key seen before.
    charges: charges made. charged_twice: orders with more than one charge, by any keys.
    uncharged: completed orders without a charge. overcharged: failed orders with one. wrong_amount: completed orders
    charged another amount than ordered.
    """

    requests: int
    repeated: int
    charges: int
    charged_twice: tuple[str, ...]
    uncharged: tuple[str, ...]
    overcharged: tuple[str, ...]
    wrong_amount: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """One charge of the right amount for each completed order, none for a failed one."""
        return not (self.charged_twice or self.uncharged or self.overcharged or self.wrong_amount)


def read_ledger(path: Path, completed: dict[str, str], failed: Iterable[str]) -> Proof:
    """Hold the ledger against the orders that completed (order id to amount) and the ids of those that failed."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        requests, keys = db.execute("select count(*), count(distinct key) from requests").fetchone()
        charges = db.execute("select order_id, amount from charges order by rowid").fetchall()
    finally:
        db.close()
    charged: dict[str, list[float]] = {}
    for order_id, amount in charges:
        charged.setdefault(order_id, []).append(float(amount))
    return Proof(
        requests=requests,
        repeated=requests - keys,
        charges=len(charges),
        charged_twice=tuple(sorted(order for order, amounts in charged.items() if len(amounts) > 1)),
        uncharged=tuple(sorted(order for order in completed if order not in charged)),
        overcharged=tuple(sorted(order for order in failed if order in charged)),
        wrong_amount=tuple(
            sorted(
                order for order, amount in completed.items() if charged.get(order, [float(amount)])[0] != float(amount)
            )
        ),
    )
