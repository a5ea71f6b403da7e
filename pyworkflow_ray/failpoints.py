"""Named places at which a test may end or stop this process: the crash tests' way to strike exactly there.

A leaf: standard library only, called by storage, runtime and execution, calls nobody. In production the environment
variable is absent and `failpoint` returns after one comparison.

`PYWORKFLOW_FAILPOINT` holds `name[:count[:action]]`, several joined by commas. At the count-th hit (default: the first)
the process ends at once with exit code 137 (`exit`, the default: no clean-up runs, as with SIGKILL), or stops itself
with SIGSTOP (`stop`). With `PYWORKFLOW_FAILPOINT_ONCE=<file>` only the process that creates that file acts, whatever is
restarted later with the same environment; the file, holding name and pid, is the proof that the fault struck.
"""

from __future__ import annotations

import os
import signal
from typing import Final

EXIT_CODE: Final = 137


def _parse(text: str) -> dict[str, tuple[int, str]]:
    armed: dict[str, tuple[int, str]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = item.partition(":")
        count, _, action = rest.partition(":")
        if action not in ("", "exit", "stop") or (count and not count.isdigit()):
            raise ValueError(f"PYWORKFLOW_FAILPOINT={item!r}: write name, name:count or name:count:exit|stop")
        armed[name] = (int(count or 1), action or "exit")
    return armed


_armed = _parse(os.environ.get("PYWORKFLOW_FAILPOINT", ""))
_hits: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Do nothing, unless a test armed `name` and this is the hit it waits for."""
    if not _armed:
        return
    armed = _armed.get(name)
    if armed is None:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] == armed[0] and _claim(name):
        if armed[1] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os._exit(EXIT_CODE)


def _claim(name: str) -> bool:
    once = os.environ.get("PYWORKFLOW_FAILPOINT_ONCE")
    if not once:
        return True
    try:
        fd = os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    os.write(fd, f"{name} {os.getpid()}\n".encode())
    os.close(fd)
    return True
