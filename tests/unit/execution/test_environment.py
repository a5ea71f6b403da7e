"""The code environment: what belongs to the user, what to Python, and its key."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution.environment import (
    capture_environment,
    enter_environment,
    import_roots,
    packaged_working_dir,
    python_version,
)


def test_roots_are_the_users_directories_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    paths = sysconfig.get_paths()
    monkeypatch.setattr(
        sys, "path", [str(two), paths["stdlib"], "", str(one), paths["purelib"], str(two), str(tmp_path / "gone")]
    )
    monkeypatch.chdir(tmp_path)
    assert import_roots() == [str(two), str(tmp_path), str(one)]


def test_key_depends_on_all_that_code_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = capture_environment()
    keys = {
        plain.key,
        capture_environment({"env_vars": {"A": "1"}}).key,
        capture_environment({"env_vars": {"A": "2"}}).key,
        capture_environment(code_version="abc").key,
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    keys.add(capture_environment().key)
    assert len(keys) == 5
    assert plain.python == python_version()


def test_equal_environments_have_equal_keys() -> None:
    assert capture_environment({"a": 1, "b": 2}) == capture_environment({"b": 2, "a": 1})


def test_runtime_env_that_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(pw.ConfigurationError, match="runtime_env"):
        capture_environment({"x": object()})


def test_entering_puts_missing_roots_in_front_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "environment_probe.py").write_text("X = 1")
    environment = capture_environment().model_copy(update={"import_roots": (str(tmp_path), "/no/such/root")})
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert enter_environment(environment) == ["/no/such/root"]
    assert enter_environment(environment) == ["/no/such/root"]
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[0] == str(tmp_path)
    import environment_probe  # type: ignore[import-not-found]

    assert environment_probe.X == 1
    del sys.modules["environment_probe"]


def test_another_python_is_refused() -> None:
    environment = capture_environment().model_copy(update={"python": "2.7"})
    with pytest.raises(pw.ConfigurationError, match=r"Python 2\.7, this is"):
        enter_environment(environment)


def test_roots_in_the_package_are_those_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there, other = tmp_path / "a" / "_ray_pkg_1", tmp_path / "b" / "_ray_pkg_1", tmp_path / "other"
    for folder in (here / "src", there / "src", other):
        folder.mkdir(parents=True)
    env = {"working_dir": "gcs://_ray_pkg_1.zip"}
    monkeypatch.setattr(sys, "path", [str(here / "src"), str(here), str(other), *sys.path])
    assert packaged_working_dir(env) == str(here)
    environment = capture_environment(env, working_dir=str(here))
    assert environment.import_roots[:3] == ("{working_dir}/src", "{working_dir}", str(other))
    monkeypatch.setattr(sys, "path", [str(there), *sys.path[3:]])
    assert packaged_working_dir(env) == str(there)
    assert enter_environment(environment, working_dir=str(there)) == []
    assert sys.path[:3] == [str(there / "src"), str(there), str(other)]


def test_without_a_package_there_is_no_packaged_directory() -> None:
    assert packaged_working_dir({}) is None
    assert packaged_working_dir({"working_dir": "gcs://_ray_pkg_unheard_of.zip"}) is None


def test_the_roots_of_another_driver_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs, shared = tmp_path / "mine", tmp_path / "theirs", tmp_path / "shared"
    for folder in (mine, theirs, shared):
        folder.mkdir()
    environment = capture_environment().model_copy(update={"import_roots": (str(mine), str(shared))})
    monkeypatch.setattr(sys, "path", [str(theirs), str(shared), *sys.path])
    before = sys.path[2:]
    assert enter_environment(environment, foreign=[str(theirs), str(shared)]) == []
    assert sys.path == [str(mine), str(shared), *before]
