"""Settings: argument, then environment, then default; unknown names and bad values refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.settings import Settings, load_settings, setting_sources


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PYWORKFLOW_{name.upper()}", raising=False)


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings()
    assert settings.model_dump() == {
        "storage": tmp_path / ".pyworkflow-ray",
        "log_level": "INFO",
        "log_format": "text",
        "allow_pickle": True,
        "codec": None,
        "redact": (),
        "max_payload_bytes": None,
        "pool_min": 1,
        "pool_max": None,
        "max_pending": None,
        "worker_wait_max": 1.0,
        "compact_after": 3600.0,
        "compact_above": 256 * 2**20,
        "compact_failed_after": None,
        "retain": {},
        "alert_webhook": None,
        "alert_struggling_after": 3,
    }
    assert set(setting_sources().values()) == {"default"}


def test_argument_wins_over_environment_and_each_source_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYWORKFLOW_STORAGE", str(tmp_path / "env"))
    monkeypatch.setenv("PYWORKFLOW_LOG_LEVEL", "debug")
    monkeypatch.setenv("PYWORKFLOW_ALLOW_PICKLE", "false")
    monkeypatch.setenv("PYWORKFLOW_WORKER_WAIT_MAX", "0.5")
    settings = load_settings(storage=tmp_path / "arg", pool_max=4, log_level=None)
    assert settings.storage == tmp_path / "arg"
    assert (settings.log_level, settings.allow_pickle, settings.pool_max, settings.worker_wait_max) == (
        "DEBUG",
        False,
        4,
        0.5,
    )
    assert setting_sources(storage=tmp_path, pool_max=4) == {
        "storage": "argument",
        "log_level": "PYWORKFLOW_LOG_LEVEL",
        "log_format": "default",
        "allow_pickle": "PYWORKFLOW_ALLOW_PICKLE",
        "codec": "default",
        "redact": "default",
        "max_payload_bytes": "default",
        "pool_min": "default",
        "pool_max": "argument",
        "max_pending": "default",
        "worker_wait_max": "PYWORKFLOW_WORKER_WAIT_MAX",
        "compact_after": "default",
        "compact_above": "default",
        "compact_failed_after": "default",
        "retain": "default",
        "alert_webhook": "default",
        "alert_struggling_after": "default",
    }


def test_duration_text_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(worker_wait_max="500ms").worker_wait_max == 0.5
    monkeypatch.setenv("PYWORKFLOW_WORKER_WAIT_MAX", "2s")
    assert load_settings().worker_wait_max == 2.0


@pytest.mark.parametrize("url", ["s3://bucket/runs/", "gs://bucket"])
def test_an_url_as_storage_stays_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(storage=url).storage == url.rstrip("/")
    monkeypatch.setenv("PYWORKFLOW_STORAGE", url)
    assert load_settings().storage == url.rstrip("/")


def test_an_url_that_has_been_made_a_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pw.ConfigurationError, match="give it as text, such as 's3://bucket/prefix'"):
        load_settings(storage=Path("s3://bucket/runs"))
    monkeypatch.setenv("PYWORKFLOW_STORAGE", "s3:/bucket/runs")
    with pytest.raises(pw.ConfigurationError, match="give it as text, such as 's3://bucket/prefix'"):
        load_settings()


def test_relative_storage_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings(storage="runs").storage == tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage", 5),
        ("log_level", "LOUD"),
        ("allow_pickle", "perhaps"),
        ("pool_min", -1),
        ("pool_min", "many"),
        ("pool_max", 0),
        ("worker_wait_max", -1),
        ("worker_wait_max", "soon"),
        ("compact_after", "soon"),
        ("compact_above", -1),
        ("retain", "completd=1d"),
        ("retain", {"completed": -1}),
        ("retain", ["completed"]),
    ],
)
def test_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(pw.ConfigurationError, match=f"{name}="):
        load_settings(**{name: value})


def test_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYWORKFLOW_POOL_MIN", "many")
    with pytest.raises(pw.ConfigurationError, match="PYWORKFLOW_POOL_MIN='many'"):
        load_settings()


def test_bounds_that_contradict_are_refused() -> None:
    with pytest.raises(pw.ConfigurationError, match="pool_max=1 is below pool_min=3"):
        load_settings(pool_min=3, pool_max=1)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(pw.ConfigurationError, match=r"unknown setting storge=.*Did you mean 'storage'"):
        load_settings(storge="/tmp/x")


def test_retention_is_text_or_a_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(retain={"failed": "90d"}).retain == {"failed": 90 * 86_400.0}
    monkeypatch.setenv("PYWORKFLOW_RETAIN", "completed=30d, failed=1h")
    monkeypatch.setenv("PYWORKFLOW_COMPACT_AFTER", "10m")
    settings = load_settings()
    assert (settings.retain, settings.compact_after) == ({"completed": 30 * 86_400.0, "failed": 3600.0}, 600.0)
