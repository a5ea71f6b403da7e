"""Chunks of maps as the driver sees them: steps of their own, whose position names the items ("3[0:1000]").

Pure. Called by `history` and `driver`. Rules:

* Nothing of a chunk is recorded before it ends, but losses and dispatches made again; what a chunk is follows from
  `map_scheduled` and the position.
* A charged loss divides a chunk, so that after `max_recoveries` losses each of its items stands alone: no item is
  executed more often than `max_recoveries` + 1 times because of another one that kills its worker.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pyworkflow_ray.engine.calls import ChunkCall, Codec, Outcome
from pyworkflow_ray.engine.events import (
    ChunkCompleted,
    ErrorInfo,
    ItemFailure,
    MapScheduled,
    Payload,
    StepScheduled,
)

_POSITION = re.compile(r"(.+)\[(\d+):(\d+)\]")


def chunk_position(map_position: str, first: int, count: int) -> str:
    """ "3[0:1000]": items 0 to 999 of the map at 3."""
    return f"{map_position}[{first}:{first + count}]"


def parse_position(position: str) -> tuple[str, int, int] | None:
    """(map, first, count) of a chunk's position, None of any other."""
    if not position.endswith("]"):
        return None
    found = _POSITION.fullmatch(position)
    if found is None:
        return None
    first, end = int(found[2]), int(found[3])
    return found[1], first, end - first


def as_step(event: MapScheduled, position: str) -> StepScheduled:
    """The step that a chunk is to the driver. Never recorded."""
    return StepScheduled(
        seq=event.seq,
        at=event.at,
        position=position,
        number=event.number,
        step=event.step,
        code=event.code,
        policy=event.policy,
        executor=event.executor,
        ray_options=event.ray_options,
        breaker=event.breaker,
    )


def divide(first: int, count: int, losses: int, most: int) -> list[tuple[int, int]]:
    """The parts of a chunk that was lost for the `losses`-th time of `most`, the last time into single items.

    >>> divide(0, 1000, 1, 3)[:2], len(divide(0, 100, 2, 3)), divide(7, 1, 1, 3)
    ([(0, 100), (100, 100)], 10, [(7, 1)])
    """
    if count <= 1 or losses > most:
        return [(first, count)]
    parts = min(count, max(2, math.ceil(round(count ** (1.0 / (most - losses + 1)), 6))))
    size = math.ceil(count / parts)
    return [(at, min(size, first + count - at)) for at in range(first, first + count, size)]


def uncovered(first: int, count: int, known: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of these items is in none of the `known` runs (first, count), which lie in order and do not overlap.

    >>> uncovered(0, 10, [(2, 3), (8, 2), (30, 5)])
    [(0, 2), (5, 3)]
    """
    gaps, at, end = [], first, first + count
    for known_first, known_count in known:
        if known_first >= end or known_first + known_count <= at:
            continue
        if known_first > at:
            gaps.append((at, known_first - at))
        at = known_first + known_count
    if at < end:
        gaps.append((at, end - at))
    return gaps


def pack_items(codec: Codec, items: list[Any], first: int, stop_after: int | None) -> ChunkCall:
    """The items as they travel. One that can't be sent fails alone: its error travels in its place."""
    try:
        packed = codec.pack(items)
        return ChunkCall(first, len(items), [packed], True, packed.digest, stop_after)
    except Exception:
        pass
    singles: list[Payload | ErrorInfo] = []
    for item in items:
        try:
            singles.append(codec.pack(item))
        except Exception as error:
            singles.append(codec.encode_error(error, "permanent"))
    return ChunkCall(first, len(items), singles, False, None, stop_after)


def digest_of(codec: Codec, items: list[Any]) -> str | None:
    """Hash of the items where their encoding is canonical."""
    try:
        return codec.pack(items).digest
    except Exception:
        return None


def completed(chunk: tuple[str, int, int], outcome: Outcome, last: bool, now: float) -> ChunkCompleted:
    """The event of a chunk that ended."""
    position, first, count = chunk
    result = outcome.chunk
    assert result is not None
    return ChunkCompleted(
        at=now,
        position=position,
        first=first,
        count=count,
        done=result.done,
        dispatch=outcome.dispatch,
        started_at=outcome.started_at,
        ended_at=outcome.ended_at,
        results=result.results,
        single=result.single,
        failures=result.failures,
        errors=result.errors,
        waiting=result.waiting,
        retried=result.retried,
        items=result.items,
        last=last,
        worker=outcome.worker,
        node=outcome.node,
    )


def failed(
    chunk: tuple[str, int, int], dispatch: int, attempt: int, error: ErrorInfo, why: str, last: bool, now: float
) -> ChunkCompleted:
    """The event of a chunk of which no item could be executed, or whose items' outcome is unknown."""
    position, first, count = chunk
    return ChunkCompleted(
        at=now,
        position=position,
        first=first,
        count=count,
        done=count,
        dispatch=dispatch,
        started_at=now,
        ended_at=now,
        failures=[ItemFailure(index=first + n, error=0, attempt=attempt, why=why) for n in range(count)],
        errors=[error],
        last=last,
    )
