"""`pyworkflow-ray`: the group of commands, and the one place where errors become lines and exit codes.

0 ok, 1 the run or check failed, 2 usage, 130 Ctrl-C. Errors go to stderr, one line each; results alone to stdout.
The commands' modules are imported when a command is named, so that `--help` stays fast. Faults: a reader of our output
that has gone away ends the command quietly.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError

# Command -> module:attribute that has it.
COMMANDS = {
    "demo": "pyworkflow_ray.cli.admin:demo",
    "run": "pyworkflow_ray.cli.run:run",
    "runs": "pyworkflow_ray.cli.runs:runs",
    "recover": "pyworkflow_ray.cli.run:recover",
    "sql": "pyworkflow_ray.cli.sql:sql",
    "storage": "pyworkflow_ray.cli.admin:storage",
    "breakers": "pyworkflow_ray.cli.breakers:breakers",
    "health": "pyworkflow_ray.cli.health:health",
    "dashboard": "pyworkflow_ray.cli.dashboard:dashboard",
    "doctor": "pyworkflow_ray.cli.doctor:doctor",
}


class CommandGroup(click.Group):
    """A group that turns what its commands raise into one line on stderr and the right exit code."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
            sys.stdout.flush()
        except BaseException as error:
            code = _exit_code(error)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would make it exit code 1
            return _exit_code(error)


class LazyGroup(CommandGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = COMMANDS.get(cmd_name)
        if home is None:
            return None
        import importlib

        module, _, name = home.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


def _exit_code(error: BaseException) -> int:
    from pyworkflow_ray.cli.screen import error_line

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        error_line("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):
        # Whoever read us has enough. Keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    if isinstance(error, click.UsageError):
        where = f" (see: {error.ctx.command_path} --help)" if error.ctx is not None else ""
        error_line(error.format_message() + where)
        return 2
    if isinstance(error, click.ClickException):
        error_line(error.format_message())
        return error.exit_code
    if isinstance(error, ConfigurationError):
        error_line(str(error))
        return 2
    if isinstance(error, PyWorkflowError):
        error_line(str(error) or type(error).__name__)
        return 1
    if isinstance(error, OSError):
        error_line(f"{type(error).__name__}: {error}")
        return 1
    raise error


def _version() -> str:
    from pyworkflow_ray import __version__

    return __version__


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="pyworkflow-ray", message="%(prog)s %(version)s")
def cli() -> None:
    """Durable workflows on Ray: start runs, see what happened to them and what happens next.

    Reading needs no Ray: `runs list`, `show`, `events`, `timeline` and `storage verify` look at the storage itself
    (--storage, else PYWORKFLOW_STORAGE, else ~/.pyworkflow-ray).
    """
    if (here := os.getcwd()) not in sys.path[:1]:
        sys.path.insert(0, here)


def main() -> NoReturn:
    """Entry point of `pyworkflow-ray` and `python -m pyworkflow_ray`."""
    try:
        cli.main(prog_name="pyworkflow-ray")
    except SystemExit as end:
        health = sys.modules.get("pyworkflow_ray.cli.health")
        if health is not None:
            health.leave_what_hangs(end.code if isinstance(end.code, int) else 0)
        raise


__all__ = ["cli", "main"]
