"""Options that several commands share, and what stands in for commands that are not built yet."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pyworkflow_ray.durations import parse_duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.observability.zone import LocalZone

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_STORAGE = "~/.pyworkflow-ray"


class DurationType(click.ParamType[float]):
    """Seconds, or text such as 30s, 5m, 2h, 1d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return parse_duration(float(value) if isinstance(value, str) and _is_number(value) else value)
        except (ValueError, TypeError) as error:
            self.fail(str(error), param, ctx)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


DURATION = DurationType()


StorageName = Path | str  # a directory, or the URL of a bucket


class StorageType(click.Path):
    """A directory, or the URL of a bucket, which is left as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


def storage_option(command: F) -> F:
    return click.option(
        "--storage",
        "storage_path",
        type=StorageType(path_type=Path, file_okay=False),
        help="Directory of runs and checkpoints, or s3://bucket/prefix. "
        "Default: PYWORKFLOW_STORAGE, else ~/.pyworkflow-ray.",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")(command)


def utc_option(command: F) -> F:
    return click.option("--utc", is_flag=True, help="Show times in UTC instead of local time.")(command)


def watch_options(command: F) -> F:
    command = click.option("--watch", is_flag=True, help="Draw again until Ctrl-C, or until the run has ended.")(
        command
    )
    return click.option("--interval", type=DURATION, default="2s", show_default=True, help="With --watch: how often.")(
        command
    )


def storage_root(given: StorageName | None) -> StorageName:
    """The storage that a command means: an absolute path, or a URL."""
    from pyworkflow_ray.storage.directory import place_of

    return place_of(given or os.environ.get("PYWORKFLOW_STORAGE") or DEFAULT_STORAGE)


def zone(utc: bool) -> dt.tzinfo:
    return dt.UTC if utc else LocalZone()


def unavailable(name: str, instead: str) -> click.Command:
    """A command of the contract that this version has not: it says so and exits with 2."""

    @click.command(
        name,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        short_help="Not available in this version.",
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def refuse(arguments: tuple[str, ...]) -> None:
        raise ConfigurationError(f"{name} is not available in this version{instead and '; ' + instead}")

    refuse.help = f"Not available in this version{instead and '; ' + instead}."
    return refuse
