"""How much memory a step asks for after it was killed for want of it.

Called by the driver for each dispatch. Pure: the step's options and its history decide, so all
owners ask for the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROWTH = "memory_growth"  # of the recorded options these two are ours, the others Ray's
MOST = "max_memory"


def ask_for(options: Mapping[str, Any], out_of_memory: int) -> dict[str, Any]:
    """Ray's options for the next dispatch, after so many out-of-memory kills: `memory` grows by `memory_growth` a kill,
    up to `max_memory`."""
    asked = {name: value for name, value in options.items() if name not in (GROWTH, MOST)}
    growth, memory = options.get(GROWTH), options.get("memory")
    if growth is not None and memory is not None:
        most = options.get(MOST)
        grown = min(memory * growth ** min(out_of_memory, 64), 2.0**62)
        asked["memory"] = int(grown if most is None else min(grown, most))
    return asked
