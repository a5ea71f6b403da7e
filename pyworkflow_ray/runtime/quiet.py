"""Ray's own lines go to our logger at DEBUG: a user sees our lines and their own, not Ray's.

Called by `embedded`. Ray prints notices of killed workers and of worker counts to the driver's stdout, whatever its
settings say (lines of pid "raylet"), and forwards what our actors' processes print as they die. What users' steps print
is left alone.

Fault: a Ray that names its function otherwise keeps its noise, and nothing else happens.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from pyworkflow_ray.observability.log_format import is_our_line

_log = logging.getLogger("pyworkflow_ray.ray")

# Native stack traces and death notes of a Ray process.
_NOISE = re.compile(
    r"""^\s*\[\d{4}-\d\d-\d\d[ ][\d:,]+\s[EWIF]\s.*\.cc:\d+ | ^\*\*\*[ ]SIG | ^PC:[ ]@ | ^\s+@\s+0x | \.so[.\d]*\(
    | ^Fatal[ ]Python[ ]error:[ ]Aborted | ^Extension[ ]modules: | _private/(worker|workers/default_worker)\.py",
    | RayDeprecationWarning | ^Use[ ]get_actor_id | ^\s+not[ ]self\.actor_id | Exception[ ]raised[ ]in[ ]creation[ ]task
    | ^ray::\w+\(""",
    re.VERBOSE,
)
_OURS = ("Controller", "Anchor", "BreakerActor")


def quiet_ray() -> None:
    """Silence this process's share of Ray's lines; harmless when called again, before or after `ray.init`."""
    import ray._private.worker as worker

    original = getattr(worker, "print_to_stdstream", None)
    if original is None or getattr(original, "_pyworkflow_ray", False):
        return

    def print_to_stdstream(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(data, dict):
            return original(data, *args, **kwargs)
        shown = [line for line in data.get("lines", ()) if not _is_noise(data, str(line))]
        return original({**data, "lines": shown}, *args, **kwargs) if shown else None

    print_to_stdstream._pyworkflow_ray = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = print_to_stdstream


def _is_noise(data: dict[str, Any], line: str) -> bool:
    noise = data.get("pid") == "raylet" or _NOISE.search(line) is not None
    if not noise and data.get("is_err") and str(data.get("actor_name") or "").startswith(_OURS):
        noise = not is_our_line(line)
    if noise:
        _log.debug("%s", line)
    return noise
