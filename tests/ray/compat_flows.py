"""A module as it was written for the original PyWorkflow: it knows nothing of us."""

from __future__ import annotations

from pyworkflow import CircuitBreaker, RetryableError, sleep, step, workflow  # type: ignore[import-not-found]


class Client:
    def __init__(self) -> None:
        self.asked = 0

    async def get(self, order: str) -> str:
        self.asked += 1
        if self.asked % 2:
            raise RetryableError("busy", retry_after="50ms")
        return f"{order} paid"


client = Client()
payments = CircuitBreaker(failure_threshold=5, recovery_timeout=60)


@step(max_retries=3, timeout="30s")
async def pay(order: str) -> str:
    @payments.call
    async def call() -> str:
        return await client.get(order)

    return await call()


@workflow(tags=["orders"])
async def order_flow(order: str) -> str:
    await sleep("10ms")
    return str(await pay(order))
