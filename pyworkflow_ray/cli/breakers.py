"""`breakers list|show|open|close|reset`: the circuit breakers of a running cluster.

Faults: no cluster runs or nobody answers (2), a breaker that is not there, or does not answer (1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.main import CommandGroup
from pyworkflow_ray.cli.screen import Screen, error_line, to_json
from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.errors import PyWorkflowError

if TYPE_CHECKING:
    from pyworkflow_ray.runtime.breaker_admin import BreakerRow

_COLUMNS = ("NAME", "STATE", "FAILURES", "RETRY AFTER", "REASON")


def _address_option(command: Any) -> Any:
    return click.option("--address", help="A Ray cluster; default: RAY_ADDRESS, else one that runs here.")(command)


@click.group(cls=CommandGroup)
def breakers() -> None:
    """See and steer the circuit breakers of a running cluster.

    NAME is a breaker's name, or "name[key]" for one key of it.
    """


@breakers.command("list")
@click.option(
    "--filter", "filters", multiple=True, metavar="K=V", help="Only those of this state or name, e.g. state=open."
)
@click.option("--limit", type=click.IntRange(1), help="At most so many.")
@_address_option
@opt.json_option
def list_(filters: tuple[str, ...], limit: int | None, address: str | None, as_json: bool) -> int:
    """All breakers and keys that processes of the cluster have used, with their states."""
    from pyworkflow_ray.runtime import breaker_admin

    wanted = dict(_filter(text) for text in filters)
    breaker_admin.connect(address)
    found, silent = breaker_admin.rows()
    shown = [row for row in found if all(_fields(row).get(k) == v for k, v in wanted.items())][:limit]
    _print(shown, as_json)
    for name in silent:
        error_line(f"circuit breaker {name!r}: its actor does not answer")
    return 1 if silent else 0


@breakers.command()
@click.argument("name")
@_address_option
@opt.json_option
def show(name: str, address: str | None, as_json: bool) -> int:
    """One breaker with its keys and settings."""
    from pyworkflow_ray.resilience.breaker_settings import split_name
    from pyworkflow_ray.runtime import breaker_admin

    breaker_admin.connect(address)
    base, key = split_name(name)
    found, silent = breaker_admin.rows(base)
    found = [row for row in found if key is None or row.key == key]
    if not found:
        why = "its actor does not answer" if silent else "no process of this cluster has used it. See: breakers list"
        raise PyWorkflowError(f"circuit breaker {name!r}: {why}")
    _print(found, as_json, settings=True)
    return 0


def _steering(verb: str, event: str, says: str) -> None:
    @breakers.command(verb, help=says)
    @click.argument("name")
    @_address_option
    @opt.json_option
    def command(name: str, address: str | None, as_json: bool) -> int:
        from pyworkflow_ray.resilience.breaker import BreakerEvent
        from pyworkflow_ray.runtime import breaker_admin

        breaker_admin.connect(address)
        _print([breaker_admin.force(name, BreakerEvent(event))], as_json)
        return 0


_steering("open", "force_open", "Refuse every call, in all processes, until it is reset or closed by hand.")
_steering("close", "force_closed", "Let every call through, whatever fails, until it is reset or opened by hand.")
_steering("reset", "reset", "Close it and forget what it has counted.")


def _filter(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals or field not in ("name", "key", "state"):
        raise click.UsageError(f"--filter {text!r}: write name=..., key=... or state=...")
    return field, value


def _fields(row: BreakerRow) -> dict[str, Any]:
    view = row.view
    return {
        "name": row.name,
        "key": row.key,
        "state": view.state.value,
        "reason": view.reason,
        "generation": view.generation,
        "failures": view.failures,
        "calls": view.calls,
        "retry_after": view.open_for_s,
        "probing": len(view.permits),
        "ramp": view.ramp,
        "nodes": {node: own.reason for node, own in view.nodes},
        "settings": row.settings.as_options(),
    }


def _print(rows: list[BreakerRow], as_json: bool, *, settings: bool = False) -> None:
    screen = Screen()
    if as_json:
        screen.raw(to_json([_fields(row) for row in rows]))
        return
    if not rows:
        screen.line("no breakers")
        return
    cells = []
    for row in rows:
        rest = row.view.open_for_s
        after = "never by itself" if rest is None else format_duration(rest) if rest else ""
        full = row.name if row.key is None else f"{row.name}[{row.key}]"
        cells.append([full, row.view.state.value, str(row.view.failures), after, row.view.reason])
    screen.table(_COLUMNS, cells)
    if settings:
        screen.line(
            "settings: " + ", ".join(f"{name}={value}" for name, value in rows[0].settings.as_options().items())
        )
