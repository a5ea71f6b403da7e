"""`run`, `recover`, `runs cancel|resume|wake`: what starts or changes runs, through the api.

Faults: a module that can't be imported or names no workflow, input that is no JSON object or does not fit the
signature (usage: nothing is created), Ctrl-C (130; on an embedded Ray the run is cancelled, on a cluster it goes on).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli import render
from pyworkflow_ray.cli.reading import Reader, open_reader
from pyworkflow_ray.cli.screen import Screen, error_line, note_line, to_json
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.ids import check_run_id, new_run_id
from pyworkflow_ray.observability.words import short_name

LOOK_S = 0.5  # how often a run that is waited for is looked at: has it paused, what is it at
CANCEL_WAIT_S = 5.0  # after Ctrl-C: the run's own clean-up gets so long


@click.command()
@click.argument("target", metavar="MODULE:FLOW")
@click.option(
    "--input", "input_text", default="{}", metavar="JSON", help="A JSON object of keyword arguments; - reads stdin."
)
@click.option("--run-id", help="The run's id. Default: a new one.")
@click.option("--address", help="A Ray cluster. Default: RAY_ADDRESS, a running local cluster, a new local one.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def run(
    target: str,
    input_text: str,
    run_id: str | None,
    address: str | None,
    utc: bool,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Start a run of a workflow, wait for it, and explain how it ended.

    The result alone goes to stdout (--json: the whole view); progress and errors go to stderr. Exit code 1 when the run
    did not complete. Example: pyworkflow-ray run shop.flows:checkout --input '{"order_id": "42"}'
    """
    flow = load_flow(target)
    kwargs = parse_input(input_text, flow)
    run_id = check_run_id(run_id) if run_id is not None else new_run_id()
    with connected(storage_path, address) as pw:
        handle = pw.start(flow.options(run_id=run_id), **kwargs)
        note_line(f"{short_name(flow.definition.name)} runs as {run_id}")
        error = follow(handle)
    return report(open_reader(storage_path, opt.zone(utc)), run_id, as_json, error)


@contextlib.contextmanager
def connected(storage_path: opt.StorageName | None, address: str | None) -> Iterator[Any]:
    """The api, connected to storage and Ray for the length of a command."""
    import pyworkflow_ray as pw

    with pw.init(storage=opt.storage_root(storage_path), address=address):
        yield pw


def follow(handle: Any) -> BaseException | None:
    """Wait as `wait`; Ctrl-C cancels the run on an embedded Ray, which ends with us, and leaves it on a cluster."""
    try:
        return wait(handle)
    except KeyboardInterrupt:
        from pyworkflow_ray.runtime.client import current

        client = current()
        if client is not None and client.owns_ray:
            note_line(f"cancelling {handle.run_id}")
            with contextlib.suppress(Exception):
                handle.cancel("interrupted (Ctrl-C)")
                handle.exception(timeout=CANCEL_WAIT_S)
        else:
            note_line(f"{handle.run_id} goes on: pyworkflow-ray runs show {handle.run_id} --watch")
        raise


def wait(handle: Any) -> BaseException | None:
    """Until the run has ended, or pauses for a person; the exception that its result would raise.

    Meanwhile stderr shows what the run is at: a block drawn over itself on a terminal, elsewhere news line by line.
    """
    from pyworkflow_ray.observability.live import Drawing
    from pyworkflow_ray.watching import view_of

    drawing = Drawing(sys.stderr)
    try:
        while True:
            try:
                error: BaseException | None = handle.exception(timeout=LOOK_S)
                return error
            except TimeoutError:
                view = view_of(handle)
                if view.status == "paused":
                    return None
                drawing.show([view])
    finally:
        drawing.clear()


def wait_all(handles: Sequence[Any]) -> None:
    """Until all have ended, or pause for a person, with their progress on stderr as `wait` shows it."""
    from pyworkflow_ray.observability.live import Drawing
    from pyworkflow_ray.watching import looks

    drawing = Drawing(sys.stderr)
    try:
        for rest, ended in looks(handles, LOOK_S):
            if rest:
                drawing.show(rest, ended)
    finally:
        drawing.clear()


def report(reader: Reader, run_id: str, as_json: bool, error: BaseException | None) -> int:
    """The result on stdout and, of a run that did not complete, its three lines on stderr."""
    view = reader.view(run_id)
    if isinstance(error, PyWorkflowError) and view.status not in ("failed", "cancelled", "paused"):
        raise error  # it is about the storage, not how the run ended
    screen = Screen()
    if as_json:
        screen.raw(to_json(view.model_dump(mode="json")))
    elif view.status == "completed":
        screen.raw(json.dumps(view.result, ensure_ascii=screen.encoding.lower() not in ("utf-8", "utf8"), default=str))
    screen.flush()
    if view.status != "completed":
        render.run_show(Screen(sys.stderr), view, reader.zone)
    return 0 if view.status == "completed" else 1


def load_flow(target: str) -> Any:
    """The workflow at MODULE:FLOW.

    Raises:
        click.UsageError: it can't be imported, or is no workflow; the message says which.
    """
    from pyworkflow_ray.workflow import Workflow

    module_name, sign, path = target.partition(":")
    if not sign or not module_name or not path:
        raise click.UsageError(f"{target!r} is not MODULE:FLOW, for example shop.flows:checkout")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise click.UsageError(f"{module_name!r} is a file: name the module, {dotted}:{path}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise click.UsageError(f"no module {module_name!r} in {sys.path[0]} nor on the import path") from None
        raise click.UsageError(f"module {module_name!r} needs module {error.name!r}, which is not installed") from None
    except PyWorkflowError as error:
        raise click.UsageError(f"module {module_name!r}: {error}") from None
    except Exception as error:
        place = _last_line_of(error)
        raise click.UsageError(
            f"module {module_name!r} fails to import: {type(error).__name__}: {error}{place}"
        ) from None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, Workflow):
        return found
    flows = sorted(name for name, value in vars(module).items() if isinstance(value, Workflow))
    has = f"it has {', '.join(flows)}" if flows else "it has none; decorate an async def with @workflow"
    what = "is not there" if found is None else f"is {type(found).__name__}, no workflow"
    raise click.UsageError(f"{path!r} of module {module_name!r} {what}: {has}")


def _last_line_of(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""


def parse_input(text: str, flow: Any) -> dict[str, Any]:
    """The keyword arguments of `--input`, checked against the workflow's signature.

    Raises:
        click.UsageError: no JSON, no object, or arguments that do not fit.
    """
    if text == "-":
        text = sys.stdin.read()
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise click.UsageError(f"--input is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"--input is a JSON object of keyword arguments, not {type(value).__name__}")
    from pydantic import ValidationError

    try:
        flow.definition.arguments.validate((), dict(value))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'input'}: {e['msg']}" for e in error.errors())
        raise click.UsageError(f"--input does not fit {_call(flow)}: {wrong}") from None
    except TypeError as error:
        raise click.UsageError(f"--input does not fit {_call(flow)}: {error}") from None
    return value


def _call(flow: Any) -> str:
    return f"{flow.definition.fn.__name__}{flow.definition.signature}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


@click.command()
@click.argument("run_id")
@click.option("--reason", help="Recorded with the run.")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def cancel(
    run_id: str, reason: str | None, address: str | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None
) -> int:
    """Cancel a run: CancelledError is raised in it, its clean-up may still run, and it ends as cancelled."""
    reader = open_reader(storage_path, opt.zone(utc))
    view = reader.view(run_id)
    if view.ended_at is not None:
        note_line(
            f"{run_id} has already {'been ' if view.status == 'cancelled' else ''}{view.status}: nothing to cancel"
        )
    else:
        with connected(storage_path, address) as pw:
            handle = pw.get_run(run_id)
            handle.cancel(reason)
            wait(handle)
        view = reader.view(run_id)
    _print_view(reader, run_id, as_json)
    return 0 if view.ended_at is not None else 1


@click.command()
@click.argument("run_id")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def resume(run_id: str, address: str | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None) -> int:
    """Let a paused run go on, or a failed one from its failed step, and wait for it. Others are left alone."""
    reader = open_reader(storage_path, opt.zone(utc))
    view = reader.view(run_id)
    if view.status not in ("paused", "failed"):
        orphaned = "" if view.ended_at is not None else ". If its Ray is gone, take it up: pyworkflow-ray recover"
        note_line(f"{run_id} is {view.status}: nothing to resume{orphaned}")
        _print_view(reader, run_id, as_json)
        return 0
    with connected(storage_path, address) as pw:
        error = follow(pw.resume(run_id))
    return report(reader, run_id, as_json, error)


@click.command()
@click.argument("run_id")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def wake(run_id: str, address: str | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None) -> int:
    """Make the retries that a run waits for happen now, and wait for it. Its own sleeps stay as they are."""
    reader = open_reader(storage_path, opt.zone(utc))
    view = reader.view(run_id)
    if view.ended_at is not None:
        note_line(f"{run_id} is {view.status}: nothing to wake")
        _print_view(reader, run_id, as_json)
        return 0
    with connected(storage_path, address) as pw:
        error = follow(pw.wake(run_id))
    return report(reader, run_id, as_json, error)


@click.command()
@click.argument("run_id")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def pause(run_id: str, address: str | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None) -> int:
    """Pause a run for a person: it begins nothing more. Waits for the steps that run now to end."""
    reader = open_reader(storage_path, opt.zone(utc))
    view = reader.view(run_id)
    if view.ended_at is not None or view.status == "paused":
        note_line(f"{run_id} is {view.status}: nothing to pause")
        _print_view(reader, run_id, as_json)
        return 0
    with connected(storage_path, address) as pw:
        follow(pw.pause(run_id))
    _print_view(reader, run_id, as_json)
    return 0


@click.command()
@click.option("--steal", is_flag=True, help="Take runs from a living owner too. It will never take them back.")
@click.option("--address", help="A Ray cluster, as for `run`.")
@opt.utc_option
@opt.json_option
@opt.storage_option
def recover(steal: bool, address: str | None, utc: bool, as_json: bool, storage_path: opt.StorageName | None) -> int:
    """Take up the unfinished runs that no living owner holds, and wait for them."""
    reader = open_reader(storage_path, opt.zone(utc))
    with connected(storage_path, address) as pw:
        handles = list(pw.recover(steal=True) if steal else pw.recover())
        note_line(f"{len(handles)} unfinished run{'' if len(handles) == 1 else 's'} taken up")
        wait_all(handles)
    return _print_recovered(reader, [handle.run_id for handle in handles], as_json)


def _print_recovered(reader: Reader, run_ids: Iterable[str], as_json: bool) -> int:
    views, code = [], 0
    for run_id in run_ids:
        try:
            views.append(reader.view(run_id))
        except PyWorkflowError as error:
            error_line(f"run {run_id}: {error}")
            code = 1
    screen = Screen()
    if as_json:
        screen.raw(to_json([view.model_dump(mode="json") for view in views]))
    else:
        render.run_list(screen, views)
    return 1 if any(view.status == "failed" for view in views) else code


def _print_view(reader: Reader, run_id: str, as_json: bool) -> None:
    screen, view = Screen(), reader.view(run_id)
    if as_json:
        screen.raw(to_json(view.model_dump(mode="json")))
    else:
        render.run_show(screen, view, reader.zone)
