"""An encrypted storage, written by real runs: nothing secret lies in it, and only its key reads it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encrypted_flows as flows
import pytest
import ray
from click.testing import CliRunner

from pyworkflow_ray import connection
from pyworkflow_ray.cli.main import cli
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.storage.codec_mark import make_mark
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.storage import Storage

pytestmark = pytest.mark.ray
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def told(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The storage that a process of its own has filled through the codec, and what that process saw."""
    storage = tmp_path_factory.mktemp("encrypted") / "runs"
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "encrypted_flows.py", str(storage)],
        cwd=HERE,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return storage, json.loads(done.stdout.splitlines()[-1])


def traces() -> Iterator[bytes]:
    """The secret as it could lie in a file: as it is, in UTF-16, and in base64 at each of three offsets."""
    core = flows.SECRET[:17].encode()
    yield core
    yield core.decode().encode("utf-16-le")
    for offset in range(3):
        yield base64.b64encode(b"\0" * offset + core)[4 if offset else 0 : -4]


def leaks(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found += [f"{path.relative_to(root)}: {trace!r}" for trace in traces() if trace in data]
    return found


def test_workflows_find_their_values_and_errors_whole(told: tuple[Path, list[Any]]) -> None:
    secret, (found, array, large, code, same, other, again, kind) = flows.SECRET, told[1]
    assert found["echo"] == [secret, {"inner": [secret]}]
    assert found["previous"] == f"no answer for {secret}"
    assert found["error"] == [f"refused {secret}", secret, "Refused"]
    assert found["items"] == [f"not {secret}0", f"{secret}1" * 2, f"{secret}2" * 2]
    assert array
    assert large
    assert code == f"-{secret}+{secret}"
    assert same == "all"
    assert "another" in other
    assert again != "fails"
    assert kind == "Refused"


def test_no_byte_of_a_secret_lies_in_the_storage_compacted_or_not(told: tuple[Path, list[Any]]) -> None:
    root = told[0]
    assert len(list((root / "blobs").rglob("*"))) > 5
    assert leaks(root) == []
    compact(Storage.open(root))
    assert list((root / "checkpoints").rglob("*.parquet"))
    assert leaks(root) == []


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reads its settings as in a process of its own, whatever this one has initialised."""
    monkeypatch.setattr(connection, "_settings", None)


def invoke(*args: str, codec: str | None) -> Any:
    return CliRunner().invoke(cli, list(args), env={"PYWORKFLOW_CODEC": codec, "NO_COLOR": "1"})


def test_command_line_shows_values_with_the_key_and_none_without(told: tuple[Path, list[Any]]) -> None:
    root = str(told[0])
    shown = invoke("runs", "show", "fails", "--storage", root, codec="encrypted_flows:codec")
    assert shown.exit_code == 0, shown.output
    assert f"Refused: refused {flows.SECRET}" in shown.output
    view = json.loads(invoke("runs", "show", "all", "--json", "--storage", root, codec="encrypted_flows:codec").output)
    assert (view["input"][0]["text"], view["input"][0]["redacted"]) == ("[redacted]", True)  # by its name
    assert flows.SECRET in view["input"][1]["text"]
    for command in (["runs", "show", "fails"], ["runs", "events", "all"], ["runs", "show", "all", "--json"]):
        hidden = invoke(*command, "--storage", root, codec=None)
        assert hidden.exit_code == 0, hidden.output
        assert flows.SECRET not in hidden.output
        assert "(encrypted" in hidden.output or "events" in command
        assert "encrypted[" not in hidden.output
    rows = invoke("sql", "select message from attempts where message is not null", "--storage", root, codec=None)
    assert "(encrypted)" in rows.output


def test_verify_opens_what_is_encrypted(told: tuple[Path, list[Any]]) -> None:
    root = str(told[0])
    assert invoke("storage", "verify", "--storage", root, codec="encrypted_flows:rotated").exit_code == 0
    assert "not opened" in invoke("storage", "verify", "--storage", root, codec=None).output
    other = invoke("storage", "verify", "--storage", root, codec="encrypted_flows:only_new")
    assert other.exit_code != 0
    assert "another key" in other.output


def test_process_without_the_key_is_refused_before_it_starts_anything(told: tuple[Path, list[Any]]) -> None:
    storage = Storage.open(told[0])
    for name, word in ((None, "no codec is set"), ("encrypted_flows:only_new", "another key")):
        with pytest.raises(ConfigurationError, match=word):
            make_mark(storage, name)
