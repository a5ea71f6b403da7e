"""What a step promises about its failures, as data: recorded with the step's first event and in force until it ends."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Jitter = Literal["auto", "none", "proportional", "full", "equal", "decorrelated"]


def _left_out(default: Any) -> Any:
    """A field that is recorded only where it says something: logs stay small, and older versions read them."""
    return Field(default=default, exclude_if=lambda value: value == default)


class RetryPolicy(BaseModel):
    """The numbers of a step's policy. Spans are seconds.

    `retry_on`, `no_retry_on` and a `retry_delay` that is a callable are code and stay with the step's definition.
    """

    model_config = ConfigDict(frozen=True)

    max_retries: int | None = 0  # retries after the first attempt; None: for ever
    retry_delay_s: float = 1.0
    retry_backoff: float = 1.0
    max_retry_delay_s: float | None = None  # None: an hour where retry_backoff > 1, else no cap
    jitter: Jitter = "auto"
    timeout_s: float | None = None  # one attempt
    idempotent: bool = True
    max_recoveries: int = 3
    # one by one, the last repeats; in place of retry_delay_s and its backoff
    delays_s: tuple[float, ...] | None = _left_out(None)
    delay_by_code: bool = _left_out(False)  # a callable of the step's definition decides each delay
    retry_budget: str | None = _left_out(None)  # its name; its settings travel with the run
    on_exhausted: Literal["raise", "pause"] = _left_out("raise")
    on_open: Literal["raise", "wait"] = _left_out("raise")  # what an attempt does that its breaker refuses
    durability: Literal["strict", "relaxed"] = _left_out("strict")  # what must be durable before it begins
    total_timeout_s: float | None = _left_out(None)  # all attempts and waits together, from the first attempt's begin
