"""The orders of the demo: `orders.csv`, and the program that wrote it once.

Called by `main`; calls nothing. `python -m pyworkflow_ray.demo.orders > orders.csv` writes the same bytes again (a test
holds the committed file to that). Rows are handed to the workflow as they are, text in each field: finding out which
are malformed is the workflow's first step.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

FIELDS = ("order_id", "customer", "email", "street", "city", "country", "currency", "amount", "card", "sku", "quantity")
COUNT = 300
SEED = 20261125
ORDERS_FILE = Path(__file__).with_name("orders.csv")

T = TypeVar("T")
Row = dict[str, str]

_FIRST = "Ada Bruno Chiara Dilek Edsger Fatima Goro Hana Ines Jonas Katalin Leif Mina Noor Otto Priya Rosa Sven".split()
_LAST = [
    "Adeyemi",
    "Bergström",
    "Costa",
    "Dubois",
    "Eriksen",
    "Fischer",
    "García",
    "Haddad",
    "Ito",
    "Jansen",
    "Kowalski",
    "Lindqvist",
    "Moreau",
    "Novák",
]
_STREETS = "Harbour Street|Rue des Lilas|Lange Straße|Calle Mayor|Via Roma|Storgatan|Nowy Świat|Prinsengracht".split(
    "|"
)
_PLACES = [
    ("Lyon", "FR", "EUR"),
    ("Köln", "DE", "EUR"),
    ("Sevilla", "ES", "EUR"),
    ("Torino", "IT", "EUR"),
    ("Malmö", "SE", "SEK"),
    ("Kraków", "PL", "PLN"),
    ("Leeds", "GB", "GBP"),
    ("Portland", "US", "USD"),
    ("Osaka", "JP", "JPY"),
]
_SKUS = "mug-white mug-blue lamp-desk lamp-floor chair-oak desk-oak shelf-ash rug-wool vase-glass clock-brass".split()

# What is wrong with a malformed row, as files from a shop's export have it: (field, value).
_MALFORMED = [
    ("amount", "19,9O"),  # a letter O
    ("amount", ""),
    ("amount", "-12.50"),
    ("amount", "NaN"),
    ("currency", "EURO"),
    ("currency", "XAU"),
    ("email", "ada.at.example.org"),
    ("email", ""),
    ("country", "Germany"),
    ("quantity", "0"),
    ("quantity", "two"),
    ("street", ""),
]
_DECLINED_CARD = "tok_declined"


def _choose(rng: random.Random, items: list[T]) -> T:
    return items[int(rng.random() * len(items))]


def generate() -> Iterator[Row]:
    """The `COUNT` rows of orders.csv: one in twenty-five malformed, one in fifty with a card that is declined."""
    rng = random.Random(SEED)
    for number in range(1, COUNT + 1):
        first, last = _choose(rng, _FIRST), _choose(rng, _LAST)
        city, country, currency = _choose(rng, _PLACES)
        amount = 5 + rng.random() ** 3 * 900
        row = {
            "order_id": f"A{number:04d}",
            "customer": f"{first} {last}",
            "email": f"{first}.{number}@example.org".lower(),
            "street": f"{_choose(rng, _STREETS)} {1 + int(rng.random() * 120)}",
            "city": city,
            "country": country,
            "currency": currency,
            "amount": f"{amount * 100:.0f}" if currency == "JPY" else f"{amount:.2f}",
            "card": f"tok_{int(rng.random() * 16**8):08x}",
            "sku": _choose(rng, _SKUS),
            "quantity": str(1 + int(rng.random() ** 2 * 4)),
        }
        if number % 25 == 12:
            field, value = _MALFORMED[number // 25]
            row[field] = value
        elif number % 50 == 33:
            row["card"] = _DECLINED_CARD
        yield row


def write_orders(stream: TextIO) -> None:
    """Write the generated rows as CSV."""
    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(generate())


def read_orders(path: Path = ORDERS_FILE, limit: int | None = None) -> list[Row]:
    """The first `limit` rows (None: all) of a CSV of orders, malformed ones included, each field as text.

    Raises:
        ValueError: the file has no header with the fields of an order, or two rows of one order id.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = [field for field in FIELDS if field not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; an order has {', '.join(FIELDS)}")
        rows: list[Row] = []
        for record in reader:
            rows.append({field: (record[field] or "").strip() for field in FIELDS})
    rows = rows if limit is None else rows[:limit]
    seen: set[str] = set()
    for row in rows:
        if row["order_id"] in seen:
            raise ValueError(f"{path}: order {row['order_id']} stands twice")
        seen.add(row["order_id"])
    return rows


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    write_orders(sys.stdout)
