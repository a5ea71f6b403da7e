"""Usage: help of every command, what is not available, and input that creates nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pyworkflow_ray.cli.main import cli

Invoke = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(cli))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_and_option_has_help(invoke: Invoke, path: tuple[str, ...]) -> None:
    result = invoke(*path, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")
    command = ALL[path]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(path)} {parameter.opts}"


def test_commands_of_the_contract_are_there() -> None:
    names = {" ".join(path) for path in ALL}
    wanted = "demo|run|recover|sql|health|doctor|storage compact|storage verify|" + "|".join(
        f"runs {name}" for name in "list show events timeline cancel pause resume rerun wake summary".split()
    )
    wanted += "|" + "|".join(f"breakers {name}" for name in "list show open close reset".split())
    assert set(wanted.split("|")) <= names


@pytest.mark.parametrize("path", ["runs rerun x --from-step 3"])
def test_what_is_not_built_yet_is_refused(invoke: Invoke, path: str) -> None:
    result = invoke(*path.split())
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "is not available in this version" in result.stderr


@pytest.mark.parametrize("arguments", [["nosuch"], ["runs", "nosuch"], ["runs", "show"], ["runs", "list", "--nosuch"]])
def test_usage_errors_are_one_line_and_exit_2(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert result.stderr.startswith("error: ")


def test_bare_command_shows_its_help(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_reading_commands_load_neither_ray_nor_duckdb(shop: Any) -> None:
    code = (
        "import sys\nfrom pyworkflow_ray.cli.main import cli\n"
        f"try: cli.main(['runs', 'list', '--storage', {str(shop.root)!r}])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'ray', 'duckdb', 'pyarrow', 'opentelemetry', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


FLOWS = """
import pyworkflow_ray as pw

@pw.workflow
async def checkout(order_id: str, amount: int = 1) -> str:
    return order_id

@pw.step
async def charge() -> None: ...

number = 3
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shopflows.py").write_text(FLOWS)
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    (tmp_path / "needy.py").write_text("import nosuchmodule\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shopflows"], "'shopflows' is not MODULE:FLOW"),
        (["nosuch:checkout"], "no module 'nosuch'"),
        (["shopflows.sub:checkout"], "no module 'shopflows.sub'"),
        (["shopflows.py:checkout"], "name the module, shopflows:checkout"),
        (["broken:checkout"], "fails to import: ZeroDivisionError: division by zero"),
        (["needy:checkout"], "needs module 'nosuchmodule', which is not installed"),
        (["shopflows:nosuch"], "'nosuch' of module 'shopflows' is not there: it has checkout"),
        (["shopflows:charge"], "is Step, no workflow: it has checkout"),
        (["shopflows:number"], "is int, no workflow"),
        (["shopflows:checkout", "--input", "{"], "--input is no JSON"),
        (["shopflows:checkout", "--input", '{"order_id": NaN}'], "--input is no JSON: NaN"),
        (["shopflows:checkout", "--input", "[1]"], "is a JSON object of keyword arguments, not list"),
        (["shopflows:checkout", "--input", "{}"], "does not fit checkout("),
        (["shopflows:checkout", "--input", '{"order_id": "1", "odd": 1}'], "odd"),
        (["shopflows:checkout", "--input", '{"order_id": "1", "amount": "many"}'], "amount: Input should be a valid"),
        (["shopflows:checkout", "--input", '{"order_id": "1"}', "--run-id", "a/b"], "'a/b' is no run id"),
    ],
)
def test_wrong_module_or_input_is_usage_and_creates_nothing(
    invoke: Invoke, project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("shopflows", "broken", "needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    result = invoke("run", *arguments, "--storage", project / "storage")
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (project / "storage").exists()


def test_the_current_directory_is_first_on_the_import_path(command: Invoke, project: Path) -> None:
    done = command("run", "shopflows:nosuch", "--storage", project / "storage", cwd=project, PYTHONSAFEPATH="1")
    assert done.returncode == 2
    assert b"it has checkout" in done.stderr
    assert not (project / "storage").exists()


@pytest.mark.parametrize("command", [["runs", "list"], ["storage", "verify"], ["recover"], ["sql", "select 1"]])
def test_an_url_of_no_object_store_is_a_usage_error_and_never_an_empty_storage(
    command: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = invoke(*command, "--storage", "ftp://bucket/runs")
    monkeypatch.setenv("PYWORKFLOW_STORAGE", "ftp://bucket/runs")
    for result in (given, invoke(*command)):
        assert result.exit_code == 2
        assert "ftp://bucket/runs" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_breakers_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from pyworkflow_ray.cli import breakers

    breakers._print([], as_json=False)
    assert capsys.readouterr().out.strip() == "no breakers"


def test_a_cluster_that_listens_and_lets_nobody_in_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyworkflow_ray.runtime import embedded

    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.7:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    said = str(embedded._no_answer("RAY_ADDRESS", "10.0.0.7:6379", error, listens=True))
    assert said.startswith("RAY_ADDRESS='10.0.0.7:6379': no Ray cluster lets this process in (Failed to connect")
    assert "set RAY_AUTH_MODE=token" in said
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "RAY_AUTH_MODE" not in str(embedded._no_answer("address", "10.0.0.7:6379", error, listens=True))
