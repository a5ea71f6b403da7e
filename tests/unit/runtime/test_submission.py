"""What a run takes along when it is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import CodeEnvironment, RunCreated
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.execution import hooks
from pyworkflow_ray.runtime.submission import make_created
from pyworkflow_ray.storage.codec import StorageCodec
from pyworkflow_ray.storage.storage import Storage

payments = pw.CircuitBreaker(name="submission-payments", failure_threshold=3, recovery_timeout=7)


@pw.workflow
async def flow() -> None: ...


def created(tmp_path: Path) -> RunCreated:
    storage = Storage.open(tmp_path / "runs")
    return make_created(
        flow.definition,
        (),
        {},
        run_id=None,
        attributes={},
        storage_id=storage.storage_id,
        environment=CodeEnvironment(key="k", python="3.11"),
        codec=StorageCodec(storage),
    )


def test_a_run_takes_the_settings_of_the_declared_breakers_along(tmp_path: Path) -> None:
    _ = payments.name
    stored = json.loads(created(tmp_path).model_dump_json())
    settings = stored["breakers"]["submission-payments"]
    assert (settings["failure_threshold"], settings["recovery_timeout"]) == (3, 7.0)
    assert settings["code"]  # the version of the code that declares it
    assert settings["since"] > 0


def test_code_and_hooks_by_value_are_refused_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @pw.workflow
    async def inner() -> None: ...

    storage = Storage.open(tmp_path / "runs")
    strict = StorageCodec(storage, allow_pickle=False)
    given: dict[str, Any] = {
        "run_id": None,
        "attributes": {},
        "storage_id": storage.storage_id,
        "environment": CodeEnvironment(key="k", python="3.11"),
        "codec": strict,
    }
    with pytest.raises(ConfigurationError, match="allow_pickle is off"):
        make_created(inner.definition, (), {}, **given)
    assert make_created(flow.definition, (), {}, **given).code.how == "import"
    monkeypatch.setitem(hooks._own, "run_failed", [lambda event: None])
    with pytest.raises(ConfigurationError, match="can only travel by value"):
        make_created(flow.definition, (), {}, **given)
    assert not list((tmp_path / "runs" / "blobs").rglob("*"))
