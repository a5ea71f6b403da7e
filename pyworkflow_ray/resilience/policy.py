"""What a step promises about its failures, as data: recorded with the step's first event and in force until it ends."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Jitter = Literal["auto", "none", "proportional", "full", "equal", "decorrelated"]


class RetryPolicy(BaseModel):
    """The numbers of a step's policy. Spans are seconds.

    `retry_on` and `no_retry_on` are code and stay with the step's definition.
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
