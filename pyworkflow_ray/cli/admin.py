"""`storage compact|verify`, `demo`, and the commands that later versions bring."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.main import CommandGroup
from pyworkflow_ray.cli.reading import named
from pyworkflow_ray.cli.screen import Screen, error_line, note_line, to_json
from pyworkflow_ray.connection import codec_of
from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.observability.words import plural, size_text

if TYPE_CHECKING:
    from pyworkflow_ray.storage.port import StoragePort


@click.command()
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Keep ledger and storage here."
)
@click.option("--orders", type=click.IntRange(1), help="Only so many orders.")
@opt.json_option
def demo(directory: Path | None, orders: int | None, as_json: bool) -> int:
    """Watch a checkout of a few hundred orders get killed, and finish with nobody charged twice."""
    from pyworkflow_ray.demo.main import run_demo

    return int(run_demo(dir=directory, json=as_json, orders=orders))


@click.group(cls=CommandGroup)
def storage() -> None:
    """Look after the storage."""


class Retention(click.ParamType[tuple[str, float]]):
    """STATUS=AGE, such as completed=30d."""

    name = "status=age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        status, equals, age = str(value).partition("=")
        if not equals or status not in ("completed", "failed", "cancelled"):
            self.fail(f"{value!r} is not completed=AGE, failed=AGE or cancelled=AGE", param, ctx)
        return status, opt.DURATION.convert(age, param, ctx)


@storage.command()
@click.option("--older-than", type=opt.DURATION, default=0.0, help="Only runs that ended so long ago.")
@click.option("--above", type=click.IntRange(0), metavar="BYTES", help="Younger ones too, if all take more than this.")
@click.option("--failed-after", type=opt.DURATION, help="Failed runs too, after so long; they can't be resumed then.")
@click.option("--retain", type=Retention(), multiple=True, help="Forget runs so long after their end, by status.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@opt.json_option
@opt.storage_option
def compact(
    older_than: float,
    above: int | None,
    failed_after: float | None,
    retain: tuple[tuple[str, float], ...],
    dry_run: bool,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Move runs that ended, and long histories of live ones, into Parquet. No live run waits for it.

    Failed runs stay, for resume goes on there, unless --failed-after or --retain says otherwise.

    Example: pyworkflow-ray storage compact --older-than 1h --retain completed=90d --retain failed=1y
    """
    from pyworkflow_ray.storage.compact import Rules
    from pyworkflow_ray.storage.compact import compact as move

    rules = Rules(older_than_s=older_than, above_bytes=above, failed_after_s=failed_after, retain_s=dict(retain))
    done, screen = move(_open(storage_path), rules, dry_run=dry_run), Screen()
    if as_json:
        screen.raw(to_json(dataclasses.asdict(done)))
    elif dry_run:
        screen.line(
            f"would move {plural(done.runs, 'run')}, {plural(done.events, 'event')}, and closed epochs of "
            f"{plural(done.live, 'live run')}; would forget {plural(done.dropped, 'run')}; "
            f"{plural(done.kept, 'ended run')} would stay in journals"
        )
    else:
        screen.line(
            f"{plural(done.runs, 'run')}, {plural(done.events, 'event')} moved into "
            f"{plural(done.files, 'Parquet file')} ({size_text(done.bytes)}); "
            f"{plural(done.kept, 'ended run')} left in journals"
        )
        if done.live or done.merged or done.dropped:
            screen.line(
                f"closed epochs of {plural(done.live, 'live run')} moved, "
                f"{plural(done.merged, 'batch', 'batches')} merged, {plural(done.dropped, 'run')} forgotten"
            )
    if done.waiting and not as_json:
        screen.line(
            f"slots of {plural(done.waiting, 'run')} in Parquet stay for an hour; a compaction after that removes them"
        )
    screen.flush()
    for run_id, message in done.damaged:
        error_line(str(named(run_id, StorageError(message))))
    return 1 if done.damaged else 0


@storage.command()
@opt.json_option
@opt.storage_option
def verify(as_json: bool, storage_path: opt.StorageName | None) -> int:
    """Read every journal, checkpoint, payload, lease and index entry; exit 1 and name each file that is damaged."""
    from pyworkflow_ray.storage.codec_mark import is_marked
    from pyworkflow_ray.storage.verify import verify as read_all

    opened, screen = _open(storage_path), Screen()
    codec = codec_of(opened)
    report = read_all(opened, codec if codec.hooked else None)
    if is_marked(opened) and not codec.hooked:
        note_line("the values are encrypted and were not opened, for no codec is set (PYWORKFLOW_CODEC)")
    found = report.damaged
    if as_json:
        damaged = [{"run_id": d.run_id, "path": d.path, "error": d.error} for d in found]
        screen.raw(to_json({"runs": report.runs, "torn": report.torn, "damaged": damaged}))
    else:
        screen.line(
            f"{plural(report.runs, 'run')} read, {len(report.torn)} with a torn tail, {plural(len(found), 'error')}"
        )
    screen.flush()
    for one in found:
        error = StorageError(one.error, path=one.path)
        error_line(str(named(one.run_id, error)) if one.run_id is not None else str(error))
    return 1 if found else 0


def _open(storage_path: opt.StorageName | None) -> StoragePort:
    from pyworkflow_ray.storage.port import open_storage

    return open_storage(opt.storage_root(storage_path), create=False)
