"""Serving the dashboard: where it listens, who may come in, and its end. Called by the command; runs uvicorn.

Loopback unless told otherwise; beyond it a token is demanded, made here where none was given. Faults: a port that is
taken (said in one line), Ctrl-C (open pages are let go first: a stream never ends by itself).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from pyworkflow_ray.dashboard.app import Dashboard
from pyworkflow_ray.dashboard.guard import LOOPBACK, Rules
from pyworkflow_ray.errors import ConfigurationError

PORT: Final = 8237
SHORTEST_TOKEN: Final = 16


@dataclass(frozen=True)
class Place:
    """Where it listens. url: to open in a browser, with the token where one was made here."""

    host: str
    port: int
    url: str
    token: str | None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def rules_for(
    host: str, port: int, token: str | None, allowed: Iterable[str] = (), *, read_only: bool = False
) -> tuple[Rules, bool]:
    """Who may come in, and whether the token was made here.

    Raises:
        ConfigurationError: the token is too short to be one.
    """
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise ConfigurationError(
            f"the dashboard's token has {len(token)} characters: give {SHORTEST_TOKEN} or more, or none"
        )
    beyond = not is_loopback(host)
    made = token is None and beyond
    names = {*LOOPBACK, *(name.lower().strip("[]").removesuffix(".") for name in allowed)}
    if beyond:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower(), host.lower().strip("[]")}
    rules = Rules(
        hosts=frozenset(names),
        any_address=beyond,
        token=secrets.token_urlsafe(24) if made else token,
        read_only=read_only,
        cookie=f"pyworkflow_ray_{port}",
    )
    return rules, made


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. port 0: any free one.

    Raises:
        ConfigurationError: it can't: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        raise ConfigurationError(
            f"the dashboard can't listen at {host}:{port}: {error.strerror or error}. Give another --port or --host"
        ) from None
    return bound


def serve(
    root: Path | str,
    zone: dt.tzinfo,
    *,
    host: str,
    port: int,
    token: str | None,
    allowed: Iterable[str],
    address: str | None,
    read_only: bool,
    ready: Callable[[Place], None],
) -> None:
    """Serve until Ctrl-C. `ready` is told where.

    Raises:
        ConfigurationError: it can't listen there, or the token is none.
    """
    with contextlib.closing(listening(host, port)) as bound:
        port = bound.getsockname()[1]
        rules, made = rules_for(host, port, token, allowed, read_only=read_only)
        dashboard = Dashboard(root, zone, rules, address)
        ready(Place(host, port, _url(host, port, rules.token if made else None), rules.token))
        config = uvicorn.Config(
            dashboard,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        with _interruptible():
            _Server(config, dashboard).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, dashboard: Dashboard) -> None:
        super().__init__(config)
        self._dashboard = dashboard

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._dashboard.end_streams()
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """uvicorn raises the signal that ended it again, for whoever else wants to know: nobody does."""
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _url(host: str, port: int, token: str | None) -> str:
    shown = "localhost" if host in ("127.0.0.1", "::1", "localhost") else host
    if shown in ("0.0.0.0", "::", ""):
        shown = socket.gethostname()
    if ":" in shown:
        shown = f"[{shown.strip('[]')}]"
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
