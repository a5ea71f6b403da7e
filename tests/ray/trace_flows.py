"""Workflows for the tests of traces: steps with spans of their own, that fail, kill their worker, wait at a gate."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from opentelemetry import trace

import pyworkflow_ray as pw

STEPS = 5
FAILS, DIES, GATED = 0, 1, 3

tracer = trace.get_tracer("shop")


breaker = pw.CircuitBreaker("traced-pay", failure_threshold=100)


@pw.step(max_retries=3, retry_delay=0.01, breaker=breaker)
def work(number: int, folder: str) -> int:
    before = len(lines(folder, number))
    logging.getLogger("shop").warning("step %d begins", number)
    with tracer.start_as_current_span(f"outer {number}"):
        with tracer.start_as_current_span(f"inner {number}"):
            note(folder, number)
        if number == DIES and before == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == FAILS and before == 0:
            raise ConnectionError("once")
        if number == GATED:
            while not (Path(folder) / "gate").exists():
                time.sleep(0.005)
    return number


def note(folder: str, number: int) -> None:
    """Which span is current, as the step sees it."""
    context = trace.get_current_span().get_span_context()
    handle = os.open(Path(folder) / f"ledger-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{os.getpid()} {context.span_id:016x}\n".encode())
    os.close(handle)


def lines(folder: str, number: int) -> list[str]:
    path = Path(folder) / f"ledger-{number}"
    return path.read_text().splitlines() if path.exists() else []


@pw.workflow(name="traced")
async def traced(folder: str) -> int:
    total = 0
    pw.get_logger().info("body begins")
    for number in range(STEPS):
        total += await work(number, folder)
        logging.getLogger("shop").warning("body is past %d", number)
        if number == DIES:
            await pw.sleep(1.1)  # long enough to be parked
    return total


@pw.step
def decline(order: str) -> None:
    raise ValueError(f"{order} is declined")


@pw.workflow(name="declined")
async def declined(order: str) -> None:
    await decline(order)
