"""`runs list|show|events|timeline` straight from the storage, with no Ray; `cancel|resume|wake` through the api."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli import render
from pyworkflow_ray.cli.main import CommandGroup
from pyworkflow_ray.cli.reading import Filter, named, open_reader
from pyworkflow_ray.cli.rerun import rerun
from pyworkflow_ray.cli.run import cancel, pause, resume, wake
from pyworkflow_ray.cli.screen import Screen, error_line, to_json
from pyworkflow_ray.cli.sql import summary
from pyworkflow_ray.cli.trace import trace
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.observability.model import RunView, StepView

STATUSES = ("pending", "running", "parked", "paused", "completed", "failed", "cancelled")
STATES = (*STATUSES, "retrying", "stuck", "waiting")


@click.group(cls=CommandGroup)
def runs() -> None:
    """See runs, and act on them."""


def _state_flags(command: Callable[..., int]) -> Callable[..., int]:
    for state in reversed(STATES):
        command = click.option(f"--{state}", f"only_{state}", is_flag=True, help=f"Only runs that are {state}.")(
            command
        )
    return command


@runs.command("list")
@click.option("--status", "status", multiple=True, type=click.Choice(STATES), help="Only this status or state.")
@click.option("--workflow", help="Only runs of this workflow: its name, or the short one.")
@click.option("--since", type=opt.DURATION, help="Only runs created in the last 30s, 5m, 2h, 1d.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, newest first.")
@click.option("--before", metavar="RUN", help="The next page: only runs that come after this one in the list.")
@click.option("--filter", "filters", multiple=True, metavar="K=V", help="status=, state=, workflow=, or an attribute.")
@_state_flags
@opt.watch_options
@opt.utc_option
@opt.json_option
@opt.storage_option
def list_(
    status: tuple[str, ...],
    workflow: str | None,
    since: float | None,
    limit: int,
    before: str | None,
    filters: tuple[str, ...],
    watch: bool,
    interval: float,
    utc: bool,
    as_json: bool,
    storage_path: opt.StorageName | None,
    **flags: bool,
) -> int:
    """List runs, newest first: what each is doing, why, and what comes next."""
    states = {*status, *(name.removeprefix("only_") for name, given in flags.items() if given)}
    wanted = _parse_filters(filters, Filter(frozenset(states), workflow, since))
    reader = open_reader(storage_path, opt.zone(utc))
    screen = Screen()

    def draw() -> tuple[bool, int]:
        found = reader.listing(wanted, limit, before)
        if as_json:
            screen.raw(to_json([view.model_dump(mode="json") for view in found.views]))
        else:
            render.run_list(screen, found.views, more=found.more)
        screen.flush()
        for run_id, message in found.damaged.items():
            error_line(str(named(run_id, StorageError(message))))
        return False, 1 if found.damaged else 0

    return _repeat(draw, screen, watch, interval)


def _parse_filters(filters: tuple[str, ...], wanted: Filter) -> Filter:
    for item in filters:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise click.UsageError(f"--filter {item!r}: write name=value, for example --filter customer=acme")
        if name in ("status", "state"):
            if value not in STATES:
                raise click.UsageError(f"--filter {item!r}: one of {', '.join(STATES)}")
            wanted.states = wanted.states | {value}
        elif name == "workflow":
            wanted.workflow = value
        else:
            wanted.attributes[name] = value
    return wanted


@runs.command()
@click.argument("run_id")
@click.option("--step", "step_number", type=click.IntRange(1), help="One step: whole input, output and every attempt.")
@click.option("--all", "every", is_flag=True, help="All steps of a long run.")
@opt.watch_options
@opt.utc_option
@opt.json_option
@opt.storage_option
def show(
    run_id: str,
    step_number: int | None,
    every: bool,
    watch: bool,
    interval: float,
    utc: bool,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Explain a run: the verdict, why, and what happens next and when."""
    reader, screen = open_reader(storage_path, opt.zone(utc)), Screen()

    def draw() -> tuple[bool, int]:
        view, events = reader.read(run_id)
        if step_number is not None:
            step, scheduled = _step(view, events, step_number)
            if as_json:
                screen.raw(to_json(step.model_dump(mode="json")))
            else:
                render.step_show(screen, view, step, scheduled, reader.zone)
        elif as_json:
            screen.raw(to_json(view.model_dump(mode="json")))
        else:
            render.run_show(screen, view, reader.zone, every=every)
        return view.ended_at is not None, 0

    return _repeat(draw, screen, watch, interval)


@runs.command()
@click.argument("run_id")
@click.option("--step", "step_number", type=click.IntRange(1), help="Only events of this step.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def events(
    run_id: str, step_number: int | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None
) -> None:
    """The events of a run: the log that everything else is derived from."""
    reader, screen = open_reader(storage_path, opt.zone(utc)), Screen()
    view, log = reader.read(run_id)
    if step_number is not None:
        position = _step(view, log, step_number)[0].position
        log = [event for event in log if getattr(event, "position", None) == position]
    if as_json:
        screen.raw(to_json([event.model_dump(mode="json") for event in reader.shown(run_id, log)]))
        for note in view.notes:
            error_line(note)
    else:
        render.run_events(screen, view, log, reader.zone)


@runs.command()
@click.argument("run_id")
@opt.watch_options
@opt.utc_option
@opt.json_option
@opt.storage_option
def timeline(
    run_id: str, watch: bool, interval: float, utc: bool, as_json: bool, storage_path: opt.StorageName | None
) -> int:
    """Draw a run over time: a row a step, a segment an attempt."""
    reader, screen = open_reader(storage_path, opt.zone(utc)), Screen()

    def draw() -> tuple[bool, int]:
        view = reader.view(run_id)
        if as_json:
            screen.raw(to_json(view.model_dump(mode="json")))
        else:
            render.run_timeline(screen, view, reader.zone)
        return view.ended_at is not None, 0

    return _repeat(draw, screen, watch, interval)


def _step(view: RunView, events_: list[ev.Event], number: int) -> tuple[StepView, ev.StepScheduled | ev.MapScheduled]:
    step = next((s for s in view.steps if s.number == number), None)
    if step is None:
        known = f"it has steps 1 to {len(view.steps)}" if view.steps else "it has no steps yet"
        raise click.ClickException(f"run {view.run_id} has no step {number}: {known}")
    for event in events_:
        if isinstance(event, (ev.StepScheduled, ev.MapScheduled)) and event.position == step.position:
            return step, event
    raise AssertionError("a step of a view comes from its step_scheduled")


def _repeat(draw: Callable[[], tuple[bool, int]], screen: Screen, watch: bool, interval: float) -> int:
    """Draw once, or until the run has ended (`draw` says so) or Ctrl-C."""
    while True:
        ended, code = draw()
        screen.flush()
        if not watch or ended:
            return code
        time.sleep(max(0.1, interval))
        screen.clear()


for _command in (cancel, pause, rerun, resume, summary, trace, wake):
    runs.add_command(_command)
