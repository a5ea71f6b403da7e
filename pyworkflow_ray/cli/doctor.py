"""`doctor`: what is in force here and where it comes from, what answers, and the common mistakes in a module.

Exit code 1 where something is wrong or a mistake was found, else 0. Nothing of a module is imported: it is read.
Faults: settings that can't be read (said, and the rest is still looked at), and all that `health` reports.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyworkflow_ray.cli import options as opt
from pyworkflow_ray.cli.mistakes import Finding, find_in_files
from pyworkflow_ray.cli.screen import Screen, to_json
from pyworkflow_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from pyworkflow_ray.observability.health import Check

PACKAGES = ("ray", "pydantic", "duckdb", "pyarrow", "opentelemetry-sdk", "click", "rich", "cloudpickle")
ANY_HOST = {"00000000", "00000000000000000000000000000000"}
_LISTENS = "0A"  # in /proc/net/tcp
_NOT_SETTINGS = {"PYWORKFLOW_RAY", "PYWORKFLOW_CRYPTO_KEYS", "PYWORKFLOW_CRYPTO_KEYS_FILE"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting in force. origin: "argument", the environment variable's name, or "default"."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Advice:
    """Something about the surroundings that somebody should know."""

    about: str
    message: str
    remedy: str


@click.command()
@click.argument("modules", nargs=-1, metavar="[MODULE]...")
@click.option("--address", help="A Ray cluster. Default: RAY_ADDRESS, a running local cluster.")
@click.option("--timeout", type=opt.DURATION, help="How long storage and Ray may take. Default: 5s and 15s.")
@opt.json_option
@opt.storage_option
def doctor(
    modules: tuple[str, ...],
    address: str | None,
    timeout: float | None,
    as_json: bool,
    storage_path: opt.StorageName | None,
) -> int:
    """Settings and their origin, versions, Ray, a real write into the storage, and the common mistakes in MODULE.

    MODULE is a module, a package, a file or a directory. It is read, not imported. Mistakes: a step on the network
    without timeout, retries of what must not be done twice, retries inside retries, time, randomness and requests in a
    workflow's body, effects in its `finally`. A comment `# doctor: ignore[rule]` silences one.
    """
    root = Path.cwd()
    findings = find_in_files([path for module in modules for path in files_of(module)], root)
    settings, wrong = settings_in_force(storage_path)
    checks: list[Check] = []
    if not wrong:
        from pyworkflow_ray.health import examine_ground

        checks = list(examine_ground(storage_path, address, timeout))
    advice = [*wrong, *surroundings(settings, checks)]
    screen = Screen()
    if as_json:
        screen.raw(
            to_json(
                {
                    "versions": versions(),
                    "settings": [asdict(setting) for setting in settings],
                    "checks": [check.model_dump(mode="json") for check in checks],
                    "advice": [asdict(one) for one in advice],
                    "findings": [asdict(finding) for finding in findings],
                }
            )
        )
    else:
        _print(screen, settings, checks, advice)
        if modules:
            print_findings(screen, findings)
    screen.flush()
    return 1 if findings or advice or any(check.status in ("failing", "degraded") for check in checks) else 0


def _print(screen: Screen, settings: list[Setting], checks: list[Check], advice: list[Advice]) -> None:
    from pyworkflow_ray.observability.health import MARKS

    screen.wrapped("", ", ".join(f"{name} {version}" for name, version in versions().items()))
    screen.line()
    screen.table(("SETTING", "VALUE", "ORIGIN"), [[one.name, one.value, one.origin] for one in settings])
    screen.line()
    for check in checks:
        screen.marked(MARKS[check.status], f"{check.name}: {check.why}", _style(check))
        if check.remedy:
            screen.wrapped("  do    ", check.remedy)
    for one in advice:
        screen.marked("!", f"{one.about}: {one.message}", "yellow")
        screen.wrapped("  do    ", one.remedy)


def _style(check: Check) -> str | None:
    return {"failing": "bold red", "degraded": "yellow"}.get(check.status)


def print_findings(screen: Screen, findings: list[Finding]) -> None:
    screen.line()
    for finding in findings:
        screen.marked(f"{finding.where}:", finding.rule, "yellow")
        screen.wrapped("  what  ", finding.message)
        screen.wrapped("  do    ", finding.remedy)
    count = len(findings)
    screen.line(f"{count} mistake{'' if count == 1 else 's'} found" if count else "no mistakes found", "dim")


# What is looked at ------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Python's, ours, and those of what we lean on."""
    from pyworkflow_ray import __version__

    found = {"python": ".".join(map(str, sys.version_info[:3])), "pyworkflow-ray": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def settings_in_force(storage: opt.StorageName | None) -> tuple[list[Setting], list[Advice]]:
    """Every setting with its origin; or, where they can't be read, why."""
    from pyworkflow_ray.settings import load_settings, setting_sources

    sources = setting_sources(storage=storage)
    try:
        loaded = load_settings(storage=storage)
    except ConfigurationError as error:
        return [], [Advice("settings", str(error), "correct or unset the variable")]
    values = {name: getattr(loaded, name) for name in sources}
    return [Setting(name, _shown(value), sources[name]) for name, value in values.items()], []


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, dict):
        return ",".join(f"{name}={age:g}" for name, age in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def surroundings(settings: list[Setting], checks: list[Check]) -> list[Advice]:
    """Misspelled variables, a storage that others can write, a cluster that others can use."""
    found = [*misspelled(os.environ)]
    values = {one.name: one.value for one in settings}
    place = values.get("storage", "")
    if place and "://" not in place and values.get("allow_pickle") == "True" and _others_write(Path(place)):
        found.append(
            Advice(
                "storage",
                f"{place} can be written by other users, and values in it are unpickled: they could run code as you",
                f"chmod go-w {place}, or PYWORKFLOW_ALLOW_PICKLE=false",
            )
        )
    address = next((str(check.details.get("address", "")) for check in checks if check.name == "ray"), "")
    if address and open_to_others(address):
        found.append(
            Advice(
                "ray",
                f"the cluster at {address} listens beyond this machine without token authentication: whoever reaches "
                "the port can run code",
                "RAY_AUTH_MODE=token on head, workers and drivers, or a firewall",
            )
        )
    return found


def misspelled(environment: Iterable[str]) -> list[Advice]:
    """Variables that look like settings of ours and are none: they would be ignored without a word."""
    from pyworkflow_ray.execution.options import nearest
    from pyworkflow_ray.settings import PREFIX, Settings

    known = tuple(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
    return [
        Advice("settings", f"{name} is no setting and is ignored.{nearest(name, known)}", "correct or unset it")
        for name in sorted(environment)
        if name.upper().startswith(PREFIX) and name.upper() not in known and name.upper() not in _NOT_SETTINGS
    ]


def _others_write(root: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(root.stat().st_mode & 0o022)
    return False


def open_to_others(address: str, tables: Iterable[str] | None = None) -> bool:
    """Whether the port of an address on this machine listens for others, and no token is asked for.

    tables: text like /proc/net/tcp, for tests. A head on another machine is not judged from here.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return False
    port = address.rpartition(":")[2]
    if not port.isdecimal():
        return False
    if tables is None:
        tables = [_text(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    wanted = f"{int(port):04X}"
    for table in tables:
        for line in table.splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == _LISTENS:
                host, _, at = fields[1].partition(":")
                if at == wanted and host in ANY_HOST:
                    return True
    return False


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace")
    return ""


def files_of(target: str) -> list[Path]:
    """The Python files of a module, package, file or directory. `MODULE:FLOW` means its module.

    Raises:
        click.UsageError: there is nothing of that name.
    """
    path = Path(target)
    if path.is_dir():
        return sorted(found for found in path.resolve().rglob("*.py") if "__pycache__" not in found.parts)
    if path.is_file():
        return [path.resolve()]
    name = target.partition(":")[0]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or (spec.origin in (None, "built-in", "frozen") and not spec.submodule_search_locations):
        raise click.UsageError(f"no module, file or directory {target!r} here nor on the import path")
    if spec.submodule_search_locations:
        return [found for folder in spec.submodule_search_locations for found in files_of(folder)]
    return [Path(str(spec.origin)).resolve()]


__all__ = ["doctor", "files_of", "misspelled", "open_to_others", "surroundings", "versions"]
