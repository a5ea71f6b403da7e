"""The code environment: what belongs to the user, what to Python, and its key."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution.environment import capture_environment, enter_environment, import_roots, python_version


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
