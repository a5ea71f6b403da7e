"""`storage compact|verify`, `sql`, `demo`, and the commands that later versions bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.main import CommandGroup
from pyworkflow_ray.cli.reading import named
from pyworkflow_ray.cli.screen import Screen, error_line, to_json
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import RunNotFoundError, StorageError
from pyworkflow_ray.observability.words import size_text

if TYPE_CHECKING:
    from pyworkflow_ray.storage.storage import Storage


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


@click.command()
@click.argument("query")
@opt.json_option
@opt.storage_option
def sql(query: str, as_json: bool, storage_path: Path | None) -> None:
    """Ask the runs in SQL: views runs, events, steps, attempts, over live journals and Parquet together.

    Example: pyworkflow-ray sql "select status, count(*) from runs group by 1"
    """
    from pyworkflow_ray.storage.sql import query as ask

    store, screen = _open(storage_path), Screen()
    relation = ask(store, query)
    names, rows = tuple(relation.columns), relation.fetchall()
    if as_json:
        screen.raw(to_json([dict(zip(names, row, strict=True)) for row in rows]))
        return
    screen.table(names, [["" if cell is None else str(cell) for cell in row] for row in rows])
    screen.line(f"{len(rows)} row{'' if len(rows) == 1 else 's'}", "dim")


@click.group(cls=CommandGroup)
def storage() -> None:
    """Look after the storage."""


@storage.command()
@opt.json_option
@opt.storage_option
def compact(as_json: bool, storage_path: Path | None) -> int:
    """Move finished runs into Parquet. Live runs never wait for it; failed ones stay, for resume goes on there."""
    from pyworkflow_ray.storage.checkpoint import compact as move

    done, screen = move(_open(storage_path)), Screen()
    if as_json:
        screen.raw(to_json(dataclasses.asdict(done)))
    else:
        screen.line(
            f"{done.runs} runs, {done.events} events moved into {done.files} Parquet files ({size_text(done.bytes)}); "
            f"{done.kept} finished runs stay in their journals"
        )
    screen.flush()
    for run_id, message in done.damaged:
        error_line(str(named(run_id, StorageError(message))))
    return 1 if done.damaged else 0


@storage.command()
@opt.json_option
@opt.storage_option
def verify(as_json: bool, storage_path: Path | None) -> int:
    """Read every run, checkpoint and payload; exit 1 and name each file that is damaged."""
    store, screen = _open(storage_path), Screen()
    found: list[tuple[str | None, Exception]] = []
    torn, run_ids = [], store.list_run_ids(None)
    for run_id in run_ids:
        try:
            history = store.read_run(run_id)
            torn += [run_id] if history.torn else []
            found += [(run_id, damage) for damage in _blob_errors(store, history.events)]
        except RunNotFoundError as error:
            found += [(run_id, error)] if run_id in store.list_run_ids(None) else []
        except (StorageError, ValueError) as error:
            found.append((run_id, error))
    found += [(None, damage) for damage in _checkpoint_errors(store)]
    if as_json:
        damaged = [{"run_id": r, "path": getattr(e, "path", ""), "error": str(e)} for r, e in found]
        screen.raw(to_json({"runs": len(run_ids), "torn": torn, "damaged": damaged}))
    else:
        screen.line(f"{len(run_ids)} runs read, {len(torn)} with a torn tail, {len(found)} errors")
    screen.flush()
    for run, damage in found:
        error_line(str(named(run, damage)) if run is not None else str(damage))
    return 1 if found else 0


def _blob_errors(store: Storage, events: list[ev.Event]) -> list[Exception]:
    """What is wrong with the spilled payloads and code snapshots that a run's events name."""
    errors: list[Exception] = []
    for digest in sorted(set(_refs([event.model_dump() for event in events]))):
        try:
            store.get_blob(digest)
        except StorageError as error:
            errors.append(error)
    return errors


def _refs(value: Any) -> Iterator[str]:
    """Every `ref` of a payload or code reference, at any depth; user data is not looked into."""
    if isinstance(value, dict):
        ref = value.get("ref")
        if isinstance(ref, str) and ("enc" in value or "how" in value):
            yield ref
        for name, inner in value.items():
            if name not in ("data", "attributes", "details"):
                yield from _refs(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _refs(inner)


def _checkpoint_errors(store: Storage) -> list[Exception]:
    if not (Path(store.root) / "checkpoints").exists():
        return []
    from pyworkflow_ray.storage.checkpoint import CompactedRuns

    try:
        return list(CompactedRuns(store).check())
    except StorageError as error:
        return [error]


def _open(storage_path: Path | None) -> Storage:
    from pyworkflow_ray.storage.storage import Storage

    return Storage.open(opt.storage_root(storage_path), create=False)


health = opt.unavailable("health", "see: pyworkflow-ray runs list --stuck")
doctor = opt.unavailable("doctor", "see: pyworkflow-ray storage verify")
