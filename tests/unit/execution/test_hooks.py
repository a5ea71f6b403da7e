"""Hooks: who is told what, where, and what a hook can't do."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import RunFailed
from pyworkflow_ray.execution import hooks
from pyworkflow_ray.execution.hooks import RetryEvent, RunFailedEvent, describe_hooks, run_has_failed
from pyworkflow_ray.testing.simulator import Simulator
from tests.unit.execution.calls import CODEC, Execution

TOLD: list[Any] = []


def keep(event: Any) -> None:
    TOLD.append(event)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = {event: list(known) for event, known in hooks._own.items()}
    TOLD.clear()
    yield
    hooks._own.update(before)
    hooks._adopted = {}


@pw.step(max_retries=2, retry_delay=[0, 0.001])
def failing(times: int) -> int:
    if pw.current_step().attempt <= times:
        raise ConnectionError(f"refused {pw.current_step().attempt}")
    return pw.current_step().attempt


def test_each_retry_of_a_plain_call_is_told_with_its_delay_and_why() -> None:
    assert pw.on_retry(keep) is keep
    assert failing(2) == 3  # type: ignore[comparison-overlap]
    assert [(e.attempt, e.kind, str(e.error), e.delay, e.reason, e.run_id) for e in TOLD] == [
        (1, "transient", "refused 1", 0.0, "listed", None),
        (2, "transient", "refused 2", 0.001, "listed", None),
    ]
    assert isinstance(TOLD[0], RetryEvent)
    assert TOLD[0].step.endswith("failing")


def test_the_last_failure_is_no_retry() -> None:
    pw.on_retry(keep)
    with pytest.raises(ConnectionError):
        failing(9)
    assert [e.attempt for e in TOLD] == [1, 2]


def test_a_step_of_a_run_tells_run_and_place() -> None:
    pw.on_retry(keep)
    assert Execution().run(failing, 1).status == "completed"
    (event,) = TOLD
    assert (event.run_id, event.workflow, event.position, event.attempt) == ("order-42", "checkout", "3", 1)


def test_a_hook_is_told_once_though_it_is_registered_again_and_comes_with_the_run() -> None:
    pw.on_retry(keep)
    pw.on_retry(keep)
    Execution().run(failing, 1, hooks=describe_hooks())
    assert len(TOLD) == 1


def test_the_runs_hooks_come_with_it_and_do_not_stay_for_the_next_run() -> None:
    pw.on_retry(keep)
    described = describe_hooks()
    hooks._own["retry"].clear()  # another process, where nothing registers it
    Execution().run(failing, 1, hooks=described)
    assert len(TOLD) == 1
    Execution().run(failing, 1)
    assert len(TOLD) == 1


def test_a_hook_that_no_import_finds_goes_by_value(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    pw.on_retry(lambda event: ledger.write_text(f"{event.step} {event.attempt}"))
    (ref,) = describe_hooks()["retry"]
    assert ref.how == "value"
    source = (
        "import sys, pickle\n"
        "from pyworkflow_ray.engine.events import CodeRef\n"
        "from pyworkflow_ray.execution import hooks\n"
        "from pyworkflow_ray.storage.codec import StorageCodec\n"
        "from pyworkflow_ray.testing.blobs import MemoryBlobs\n"
        "ref = CodeRef.model_validate_json(sys.stdin.read())\n"
        "hooks.adopt_hooks({'retry': [ref]}, StorageCodec(MemoryBlobs()).decode)\n"
        "hooks.tell('retry', hooks.RetryEvent('charge', 4, 'transient', OSError(), 0.0, ''))\n"
    )
    subprocess.run([sys.executable, "-c", source], input=ref.model_dump_json(), text=True, check=True, timeout=60)
    assert ledger.read_text() == "charge 4"


def test_a_hook_that_raises_is_logged_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @pw.on_retry
    def broken(event: RetryEvent) -> None:
        raise RuntimeError("my hook is broken")

    pw.on_retry(keep)
    with caplog.at_level(logging.ERROR, "pyworkflow_ray"):
        assert failing(1) == 2  # type: ignore[comparison-overlap]
    assert len(TOLD) == 1, "the next hook is told all the same"
    assert "my hook is broken" in caplog.text


def test_a_hook_that_cannot_be_loaded_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    ref = hooks.CodeRef(how="import", name="gone", module="no_such_module", qualname="gone")
    with caplog.at_level(logging.WARNING, "pyworkflow_ray"):
        assert Execution().run(failing, 1, hooks={"retry": [ref]}).status == "completed"
        assert Execution().run(failing, 1, hooks={"retry": [ref]}).status == "completed"
    assert len([r for r in caplog.records if "gone" in r.getMessage()]) == 1


@pytest.mark.parametrize("wrong", [3, None, failing])
def test_what_is_no_plain_function_is_refused(wrong: Any) -> None:
    with pytest.raises(pw.ConfigurationError, match="on_retry"):
        pw.on_retry(wrong)


def test_an_async_hook_is_refused() -> None:
    async def later(event: RunFailedEvent) -> None: ...

    with pytest.raises(pw.ConfigurationError, match=r"on_run_failed.*async"):
        hooks.on_run_failed(later)


def failed_run(kind: str, error: Exception) -> None:
    async def flow() -> None: ...

    created = Simulator(flow, {}).store.events()[0].model_copy(update={"hooks": describe_hooks()})
    run_has_failed(created, RunFailed(error=CODEC.encode_error(error, kind), position="3"), CODEC)  # type: ignore


def test_a_failed_run_is_told_with_its_own_exception() -> None:
    hooks.on_run_failed(keep)
    failed_run("transient", ConnectionError("refused"))
    (event,) = TOLD
    assert (event.run_id, event.workflow, event.kind, event.position) == ("simulated", "simulated", "transient", "3")
    assert isinstance(event.error, ConnectionError)


def test_a_run_that_fails_of_a_cascade_is_logged_once_as_critical(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        failed_run("permanent", ValueError("bad"))
        assert caplog.records == []
        failed_run("cascade", pw.CircuitOpenError("payments is open"))
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert "payments is open" in record.getMessage()
