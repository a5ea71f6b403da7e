"""The workflow of the demo: validate, charge, reserve (primary, fallback, offline), send the receipt.

Started by `main`, imported by every worker; calls the public api and `client`. It reads as an ordinary shop's code, and
that is the point: what survives a kill -9 here is what is written here, with nothing added for it.
"""

from __future__ import annotations

import csv
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import pyworkflow_ray as pw
from pyworkflow_ray.demo.client import ServicesClient

CURRENCIES = {"EUR", "GBP", "JPY", "PLN", "SEK", "USD"}
OFFLINE_STOCK = Path(__file__).with_name("stock_offline.csv")

http = pw.resource(ServicesClient, close=ServicesClient.close)


class InvalidOrder(ValueError):
    """The row of an order is malformed. Permanent: a second look at the same row finds the same."""


class Order(BaseModel):
    """A row that passed validation. `services` is the address of the shop's services, "host:port"."""

    model_config = ConfigDict(frozen=True)

    order_id: str
    email: str
    amount: Decimal
    currency: str
    card: str
    sku: str
    quantity: int
    services: str


class Confirmation(BaseModel):
    """What a completed checkout returns. `stock` says which source the goods came from."""

    model_config = ConfigDict(frozen=True)

    order_id: str
    charge: str
    stock: str
    receipt_to: str


@pw.step(executor="local")
async def validate(row: dict[str, str], services: str) -> Order:
    """The order in a row of the CSV, or InvalidOrder that names field and value."""

    def refuse(field: str, why: str) -> InvalidOrder:
        return InvalidOrder(f"order {row['order_id']}: {field} {row[field]!r} {why}")

    try:
        amount = Decimal(row["amount"])
    except InvalidOperation:
        raise refuse("amount", "is no number") from None
    if not amount.is_finite() or amount <= 0:
        raise refuse("amount", "is not above zero")
    if row["currency"] not in CURRENCIES:
        raise refuse("currency", f"is none of {', '.join(sorted(CURRENCIES))}")
    if not re.fullmatch(r"[^@\s]+@[^@\s]+\.[a-z]+", row["email"]):
        raise refuse("email", "is no address")
    if not re.fullmatch(r"[A-Z]{2}", row["country"]):
        raise refuse("country", "is no two-letter code")
    for field in ("customer", "street", "city"):
        if not row[field]:
            raise refuse(field, "is empty")
    if not row["quantity"].isdecimal() or int(row["quantity"]) < 1:
        raise refuse("quantity", "is no whole number above zero")
    return Order(
        order_id=row["order_id"],
        email=row["email"],
        amount=amount,
        currency=row["currency"],
        card=row["card"],
        sku=row["sku"],
        quantity=int(row["quantity"]),
        services=services,
    )


@pw.step(max_retries=10, retry_delay=0.2, retry_backoff=2, max_retry_delay=1, timeout="1.5s", num_cpus=0.5)
def charge(order: Order) -> str:
    """Charge the card, once: all attempts and recoveries of this step send the same idempotency key."""
    body = {"order_id": order.order_id, "amount": str(order.amount), "currency": order.currency, "card": order.card}
    key = pw.current_step().idempotency_key
    return str(http().post(order.services, "/payments/charges", body, key=key)["charge"])


def _reserve(order: Order, source: str) -> str:
    body = {"order_id": order.order_id, "sku": order.sku, "quantity": order.quantity}
    key = pw.current_step().idempotency_key
    return str(http().post(order.services, f"/stock/{source}/reservations", body, key=key)["source"])


@pw.step(max_retries=2, retry_delay=0.1, timeout="1.5s", num_cpus=0.5)
def reserve_primary(order: Order) -> str:
    return _reserve(order, "primary")


@pw.step(max_retries=2, retry_delay=0.1, timeout="1.5s", num_cpus=0.5)
def reserve_fallback(order: Order) -> str:
    return _reserve(order, "fallback")


@pw.step(executor="local")
def reserve_offline(order: Order) -> str:
    """Promise the goods from the last stock list, for a person to confirm: the source that is always there."""
    with OFFLINE_STOCK.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["sku"] == order.sku and int(row["quantity"]) >= order.quantity:
                return f"offline ({row['warehouse']})"
    raise LookupError(f"order {order.order_id}: {order.sku} is in no stock list")


@pw.step(max_retries=10, retry_delay=0.2, retry_backoff=2, max_retry_delay=1, timeout="1.5s", num_cpus=0.5)
def send_receipt(order: Order, charge_id: str) -> str:
    body = {"order_id": order.order_id, "email": order.email, "charge": charge_id}
    key = pw.current_step().idempotency_key
    return str(http().post(order.services, "/receipts", body, key=key)["sent"])


@pw.workflow(version="1")
async def checkout(row: dict[str, str], services: str) -> Confirmation:
    order = await validate(row, services)
    charge_id = await charge(order)
    try:
        stock = await reserve_primary(order)
    except (ConnectionError, TimeoutError):
        try:
            stock = await reserve_fallback(order)
        except (ConnectionError, TimeoutError):
            stock = await reserve_offline(order)
    sent_to = await send_receipt(order, charge_id)
    return Confirmation(order_id=order.order_id, charge=charge_id, stock=stock, receipt_to=sent_to)
