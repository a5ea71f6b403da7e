"""`sql` and `runs summary`: questions to all runs at once, straight from the storage, with no Ray.

Called by `main` and `runs`; calls the storage's SQL. Faults: wrong SQL and unknown answers (usage), damaged journals
and checkpoints (named, exit code 1).
"""

from __future__ import annotations

import time

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.screen import Screen, to_json

NAMES = ("overview", "failures", "retries", "slowest", "recovery", "nodes", "breakers", "died")


@click.command()
@click.argument("query")
@opt.json_option
@opt.storage_option
def sql(query: str, as_json: bool, storage_path: opt.StorageName | None) -> None:
    """Ask the runs in SQL: views runs, events, steps, attempts, over live journals and Parquet together.

    Example: pyworkflow-ray sql "select status, count(*) from runs group by 1"
    """
    _print(Screen(), storage_path, query, as_json)


@click.command()
@click.argument("answer", type=click.Choice(NAMES), default="overview")
@click.option("--since", type=opt.DURATION, help="Only what began in the last 30s, 5m, 2h, 1d.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="With slowest: so many steps.")
@click.option("--node", help="With died: whatever was lost on this node.")
@opt.json_option
@opt.storage_option
def summary(
    answer: str, since: float | None, limit: int, node: str | None, as_json: bool, storage_path: opt.StorageName | None
) -> None:
    """Answer what is asked after failures, over all runs.

    \b
    overview  how runs ended, or stand, by workflow
    failures  how often each step fails, and of what
    retries   what failed attempts cost: their time, and the waits after them
    slowest   which steps take longest, waits and retries included
    recovery  how long it took until what was lost went on
    nodes     which nodes fail: attempts that failed or were lost there
    breakers  what circuit breakers saved: attempts that refused steps had left
    died      what was running when a node died
    """
    from pyworkflow_ray.answers import answer_sql
    from pyworkflow_ray.storage.answers import ANSWERS

    screen = Screen()
    if not as_json:
        screen.line(ANSWERS[answer].title, "dim")
    begin = None if since is None else time.time() - since
    _print(screen, storage_path, answer_sql(answer, begin, limit=limit, node=node), as_json)


def _print(screen: Screen, storage_path: opt.StorageName | None, query: str, as_json: bool) -> None:
    from pyworkflow_ray.storage.port import open_storage
    from pyworkflow_ray.storage.sql import rows

    names, found = rows(open_storage(opt.storage_root(storage_path), create=False), query)
    if as_json:
        screen.raw(to_json([dict(zip(names, row, strict=True)) for row in found]))
        return
    screen.table(tuple(names), [["" if cell is None else str(cell) for cell in row] for row in found])
    screen.line(f"{len(found)} row{'' if len(found) == 1 else 's'}", "dim")
