"""`dashboard`: runs and breakers in a browser. Calls `pyworkflow_ray.dashboard`, which needs an extra.

Faults: the extra is not installed (one line with the command), a port that is taken, a storage that is none, Ctrl-C
(its end).
"""

from __future__ import annotations

import importlib.util

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.reading import open_reader
from pyworkflow_ray.cli.screen import note_line
from pyworkflow_ray.errors import ConfigurationError

NEEDED = ("starlette", "uvicorn", "jinja2")


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen at. Beyond loopback a token is demanded."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8237, show_default=True, help="0: any free one.")
@click.option(
    "--token",
    envvar="PYWORKFLOW_DASHBOARD_TOKEN",
    help="Demand this token of visitors, 16 characters at least. Beyond loopback one is made where none is given. "
    "Better in PYWORKFLOW_DASHBOARD_TOKEN: command lines are seen by all users of a machine.",
)
@click.option(
    "--allow-host",
    "allowed",
    multiple=True,
    metavar="NAME",
    help="A further name by which browsers reach it, of a proxy say.",
)
@click.option(
    "--address", help="A Ray cluster to act on. Default: RAY_ADDRESS, a running local cluster. None is started."
)
@click.option("--read-only", is_flag=True, help="Only show: nothing can be done from it, and no Ray is looked for.")
@opt.utc_option
@opt.storage_option
def dashboard(
    host: str,
    port: int,
    token: str | None,
    allowed: tuple[str, ...],
    address: str | None,
    read_only: bool,
    utc: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Show runs and breakers in a browser, live, and act on them.

    It reads the storage itself, without Ray; only acting, and the state of living breakers, need a running cluster.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"the dashboard needs {', '.join(missing)}: pip install 'pyworkflow-ray[dashboard]'")
    from pyworkflow_ray.dashboard.server import Place, serve

    reader = open_reader(storage_path, opt.zone(utc))

    def ready(place: Place) -> None:
        click.echo(place.url)
        if place.token is not None and "token=" not in place.url:
            note_line("its token is demanded: the one that it was given")
        note_line(f"the dashboard of {reader.root} runs until Ctrl-C")

    serve(
        reader.root,
        reader.zone,
        host=host,
        port=port,
        token=token or None,
        allowed=allowed,
        address=address,
        read_only=read_only,
        ready=ready,
    )
    return 0
