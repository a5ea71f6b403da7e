"""Many async calls at once: each is answered only when all of them are there."""

from __future__ import annotations

import asyncio
import os

import pyworkflow_ray as pw


@pw.step(executor="local")
async def call(port: int, number: int) -> tuple[int, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET /{number} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    return int(answer.rpartition(b"\r\n")[2]), os.getpid()


@pw.workflow
async def crowd(port: int, count: int) -> list[tuple[int, int]]:
    return list(await asyncio.gather(*(call(port, number) for number in range(count))))


@pw.workflow
async def chain(port: int, count: int) -> list[int]:
    """Two calls one after another, each in so many tasks: the second are due while a first still waits."""

    async def both(number: int) -> int:
        await call(port, number)
        return (await call(port, number + count))[0]

    return list(await asyncio.gather(call(port, 2 * count), *(both(number) for number in range(count))))  # type: ignore[arg-type]
