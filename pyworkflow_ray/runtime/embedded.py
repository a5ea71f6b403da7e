"""Finding or starting Ray for this process, quietly.

Called by `client`. Address as in Ray: argument, `RAY_ADDRESS`, a running local cluster, else a new local one. An
initialised Ray is used as it is.

Faults: the address is a job server's (http), or nobody answers there: one clear line, and nothing is started.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.runtime.quiet import quiet_ray

_ANSWER_S = 5.0


def ensure_ray(address: str | None, options: dict[str, Any] | None = None) -> bool:
    """Connect this process to Ray. True where this call has started a local Ray, which then ends with us.

    Raises:
        ConfigurationError: the address is no cluster's, or nobody answers there.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # uv run is mirrored into every worker otherwise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet_ray()
    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)  # its banner comes before its own setting is in force
    given = address or os.environ.get("RAY_ADDRESS") or None
    source = "address" if address else "RAY_ADDRESS"
    if given is not None and given.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"{source}={given!r} is a job server, which takes jobs (ray job submit --address {given} -- python ...), "
            "not drivers. Give the cluster's address, HOST:6379, or unset it for a local Ray"
        )
    if given is not None:
        _check_answers(given, source)
    settings: dict[str, Any] = {
        "log_to_driver": True,
        "logging_level": "ERROR",
        "configure_logging": True,
        **(options or {}),
    }
    try:
        ray.init(address=given, **settings)
    except ConnectionError as error:
        raise _no_answer(source, given, error, listens=given is not None) from None
    quiet_ray()
    return _is_ours()


def _check_answers(given: str, source: str) -> None:
    """Ask the port itself: Ray tries an address where nobody answers for minutes."""
    host, _, port = given.rpartition(":")
    if given in ("local", "auto") or "://" in given or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(source, given, error) from None


def _no_answer(source: str, given: str | None, error: Exception, *, listens: bool = False) -> ConfigurationError:
    if listens and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ConfigurationError(
            f"{source}={given!r}: no Ray cluster lets this process in ({_first_line(error)}). Nothing was started. "
            "Where it demands a token (`ray start` does, once ~/.ray/auth_token is there) set RAY_AUTH_MODE=token. "
            "Else start it, correct the address, or unset it for a local Ray"
        )
    return ConfigurationError(
        f"{source}={given!r}: no Ray cluster answers there ({_first_line(error)}). Nothing was started. Start it, "
        "correct the address, or unset it for a local Ray"
    )


def _is_ours() -> bool:
    """Whether `ray.init` has started the cluster it connected to."""
    import ray._private.worker as worker

    node = getattr(worker, "_global_node", None)
    return bool(node is not None and node.is_head())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
