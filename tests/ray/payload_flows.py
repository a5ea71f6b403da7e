"""Workflows that hand large values from step to step, and say where they found them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import pyworkflow_ray as pw
from pyworkflow_ray.storage import memory


@pw.step
def make(mib: float, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(int(mib * 1024 * 1024) // 8)


@pw.step
def look(value: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Its sum, and whether its memory is a mapped blob."""
    start = value.__array_interface__["data"][0]
    maps = Path("/proc/self/maps").read_text().splitlines()
    lines = [line for line in maps if int(line.split("-")[0], 16) <= start < int(line.split("-")[1].split()[0], 16)]
    place = memory.find(memoryview(value).cast("B"))
    return {
        "sum": float(value.sum()),
        "mapped": lines[0].split(None, 5)[-1],
        "writable": value.flags.writeable,
        "known": place is not None,
        "pid": os.getpid(),
    }


@pw.step
def same(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return value


@pw.step(executor="local")
def make_here(mib: float) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).random(int(mib * 1024 * 1024) // 8)


@pw.workflow
async def hand_on(mib: float) -> dict[str, Any]:
    return await look(await make(mib))


@pw.workflow
async def hand_on_in_parts(mib: float) -> list[dict[str, Any]]:
    value = await same(await make(mib))
    half = value[: len(value) // 2]
    return [await look(value), await look(half), await look(await make_here(mib))]


@pw.workflow
async def hand_on_after_a_sleep(mib: float) -> dict[str, Any]:
    value = await make(mib)
    await pw.sleep("1500ms")  # parked: another activation goes on
    return await look(value)


@pw.workflow
async def give(mib: float) -> np.ndarray[Any, Any]:
    return await make(mib)


@pw.workflow
async def map_over(mib: float) -> list[Any]:
    pieces = np.split(await make(mib), 4)
    found = await look.map(pieces, chunk_size=2)
    return [one["sum"] for one in found.results]
