"""`runs rerun`: one run anew, or many at a bounded rate, and wait for them.

Faults: an unknown or damaged run (named; of many the others go on), Ctrl-C half way (130: what was started goes on, and
the same command later leaves out what it has rerun already).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli import render
from pyworkflow_ray.cli.reading import Filter, Reader, open_reader
from pyworkflow_ray.cli.run import connected, follow, report, wait_all
from pyworkflow_ray.cli.screen import Screen, error_line, note_line, to_json
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.observability.model import RunView

T = TypeVar("T")

RATE = 10.0
STATUSES = ("failed", "cancelled", "completed", "paused")


@click.command()
@click.argument("run_ids", nargs=-1, metavar="[RUN_ID]...")
@click.option("--status", multiple=True, type=click.Choice(STATUSES), help="All runs of this status.")
@click.option("--workflow", help="Of them, only runs of this workflow: its name, or the short one.")
@click.option("--since", type=opt.DURATION, help="Of them, only those created in the last 30s, 5m, 2h, 1d.")
@click.option("--limit", type=click.IntRange(1), help="Of them, at most so many, oldest first.")
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=RATE,
    show_default=True,
    help="Start at most so many runs a second: what failed them may not bear them all at once.",
)
@click.option("--again", is_flag=True, help="With --status: also runs that have been rerun before.")
@click.option("--from-step", type=int, help="Fork from a step: not available in this version.")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def rerun(
    run_ids: tuple[str, ...],
    status: tuple[str, ...],
    workflow: str | None,
    since: float | None,
    limit: int | None,
    rate: float,
    again: bool,
    from_step: int | None,
    address: str | None,
    utc: bool,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Start new runs with the workflow and arguments of old ones, and wait for them.

    Name the runs, or choose them: pyworkflow-ray runs rerun --status failed --since 1d --rate 5. Of chosen ones those
    that have been rerun before are left out. A new run executes all its steps; to go on from a failed one: runs resume.
    """
    if from_step is not None:
        raise click.UsageError("--from-step is not available in this version; runs resume goes on from the failed step")
    if bool(run_ids) == bool(status):
        raise click.UsageError("give either RUN_IDs or --status, for example --status failed")
    reader = open_reader(storage_path, opt.zone(utc))
    damaged: list[str] = []
    chosen = [reader.view(run_id).run_id for run_id in run_ids]
    if status:
        chosen, damaged = choose(reader, Filter(frozenset(status), workflow, since), again, limit)
    for message in damaged:
        error_line(message)
    if not chosen:
        note_line("no run to rerun")
        return 1 if damaged else 0
    with connected(storage_path, address) as pw:
        started, refused = [], 0
        for run_id in paced(chosen, rate):
            try:
                handle = pw.rerun(run_id)
            except PyWorkflowError as error:
                error_line(f"run {run_id}: {error}")
                refused += 1
                continue
            started.append(handle)
            note_line(f"{run_id} runs anew as {handle.run_id}")
        if len(chosen) == 1 and started:
            ended = follow(started[0])
        else:
            wait_all(started)
    if len(chosen) == 1 and started:
        return report(reader, started[0].run_id, as_json, ended)
    return _print_all(reader, [handle.run_id for handle in started], as_json) or int(bool(refused or damaged))


def choose(reader: Reader, wanted: Filter, again: bool, limit: int | None) -> tuple[list[str], list[str]]:
    """Ids of the runs to be rerun, oldest first, and what is to be said of damaged ones."""
    found: list[RunView] = []
    rerun_before: set[str] = set()
    damaged: list[str] = []
    for item in reader.views(time.time()):
        if not isinstance(item, RunView):
            damaged.append(str(item))
            continue
        if item.rerun_of is not None:
            rerun_before.add(item.rerun_of)
        if wanted.takes(item):
            found.append(item)
    ids = [view.run_id for view in sorted(found, key=lambda v: (v.created_at, v.run_id))]
    return [run_id for run_id in ids if again or run_id not in rerun_before][:limit], damaged


def paced(
    items: Iterable[T],
    rate: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[T]:
    """The items, at most `rate` of them a second, evenly: one that took long is not made up for."""
    due = clock()
    for item in items:
        now = clock()
        if now < due:
            sleep(due - now)
        due = max(due, now) + 1.0 / rate
        yield item


def _print_all(reader: Reader, run_ids: list[str], as_json: bool) -> int:
    views = [reader.view(run_id) for run_id in run_ids]
    screen = Screen()
    if as_json:
        screen.raw(to_json([view.model_dump(mode="json") for view in views]))
    else:
        render.run_list(screen, views)
    screen.flush()
    return 0 if all(view.status == "completed" for view in views) else 1
