"""`storage compact|verify`, `sql`, `demo`, and the commands that later versions bring."""

from __future__ import annotations

from pathlib import Path

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.main import CommandGroup
from pyworkflow_ray.cli.screen import Screen, error_line, to_json


@click.command()
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Keep ledger and storage here."
)
@click.option("--orders", type=click.IntRange(1), help="Only so many orders.")
@opt.json_option
def demo(directory: Path | None, orders: int | None, as_json: bool) -> int:
    """Watch a checkout of a few hundred orders get killed, and finish with nobody charged twice."""
    from pyworkflow_ray import demo as package

    return int(package.main(directory=directory, as_json=as_json, orders=orders) or 0)


@click.command()
@click.argument("query")
@opt.json_option
@opt.storage_option
def sql(query: str, as_json: bool, storage_path: Path | None) -> None:
    """Ask the runs in SQL: views runs, events, steps, attempts, over live journals and Parquet together.

    Example: pyworkflow-ray sql "select status, count(*) from runs group by 1"
    """
    raise NotImplementedError


@click.group(cls=CommandGroup)
def storage() -> None:
    """Look after the storage."""


breakers = opt.unavailable("breakers", "in Python: breaker.state")
health = opt.unavailable("health", "see: pyworkflow-ray runs list --stuck")
doctor = opt.unavailable("doctor", "see: pyworkflow-ray storage verify")
__all__ = ["Screen", "breakers", "demo", "doctor", "error_line", "health", "sql", "storage", "to_json"]
