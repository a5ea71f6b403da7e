"""`register_kind`: a user's own types, here and in the processes that runs take them to."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.execution.submission import make_created
from pyworkflow_ray.resilience import taxonomy
from pyworkflow_ray.resilience.breaker import BreakerEvent, event_of
from pyworkflow_ray.resilience.taxonomy import adopt_kinds, classify, register_kind, registered_kinds
from tests.unit.execution.calls import CODEC, Execution


class Busy(ValueError):
    pass


class VeryBusy(Busy):
    pass


class Upstream(Exception):
    pass


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    own = registered_kinds()
    yield
    taxonomy._own_kinds.clear()
    taxonomy._own_kinds.update(own)
    adopt_kinds({"": "transient"})  # whatever it was, the next call replaces it
    adopt_kinds({})


def busy(times: int) -> pw.Step[[], str]:
    left = [Busy("busy")] * times

    @pw.step(max_retries=3, retry_delay=0)
    def ask() -> str:
        if left:
            raise left.pop()
        return "done"

    return ask


def test_a_registered_type_and_its_subclasses_have_the_kind_it_was_given() -> None:
    assert pw.classify(Busy()) == "permanent"
    pw.register_kind(Busy, "transient")
    assert pw.classify(Busy()) == pw.classify(VeryBusy()) == "transient"
    assert pw.classify(ValueError()) == "permanent"
    pw.register_kind(VeryBusy, "timeout")
    assert (pw.classify(Busy()), pw.classify(VeryBusy())) == ("transient", "timeout")
    pw.register_kind(Busy, "cascade")
    assert pw.classify(Busy()) == "cascade"
    assert pw.classify(ExceptionGroup("g", [Busy(), Busy()])) == "cascade"


@pytest.mark.parametrize(("exc_type", "kind"), [(Busy, "often"), (int, "transient"), (Busy(), "transient")])
def test_a_wrong_registration_is_refused_and_changes_nothing(exc_type: type[BaseException], kind: str) -> None:
    before = registered_kinds()
    with pytest.raises(pw.ConfigurationError):
        pw.register_kind(exc_type, kind)  # type: ignore[arg-type]
    assert registered_kinds() == before


def test_a_class_that_is_made_again_keeps_its_kind() -> None:
    def cell() -> type[Exception]:
        class Declined(Exception):
            pass

        return Declined

    register_kind(cell(), "permanent")
    assert classify(cell()()) == "permanent"


def test_plain_calls_follow_it() -> None:
    assert busy(0).fn() == "done"
    with pytest.raises(Busy):
        busy(1)()
    register_kind(Busy, "transient")
    assert busy(2)() == "done"  # type: ignore[comparison-overlap]


def test_a_users_cascade_is_not_retried_and_counts_for_a_breaker() -> None:
    register_kind(Upstream, "cascade")
    tries = []

    @pw.step(max_retries=3, retry_delay=0)
    def ask() -> None:
        tries.append(1)
        raise Upstream("gone")

    with pytest.raises(Upstream):
        ask()
    assert len(tries) == 1
    assert event_of(classify(Upstream()), Upstream()) is BreakerEvent.FAILURE
    assert event_of(classify(pw.CircuitOpenError("x")), pw.CircuitOpenError("x")) is BreakerEvent.RELEASE


def test_the_log_level_follows_it(caplog: pytest.LogCaptureFixture) -> None:
    register_kind(Busy, "timeout")
    with caplog.at_level(logging.DEBUG, "pyworkflow_ray"):
        busy(1)()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_it_travels_with_a_run_and_with_each_of_its_step_calls() -> None:
    register_kind(Busy, "transient")

    @pw.workflow
    async def flow() -> None: ...

    created = make_created(
        flow.definition,
        (),
        {},
        run_id=None,
        attributes={},
        storage_id="s",
        environment=CodeEnvironment(key="k", python="3.11"),
        codec=CODEC,
    )
    kinds = created.kinds
    assert kinds == {f"{__name__}:Busy": "transient"}
    taxonomy._own_kinds.clear()  # another process, which has not run the code that registers it
    adopt_kinds({})
    taxonomy._refresh()
    assert Execution().run(busy(1)).status == "failed"
    assert Execution().run(busy(1), kinds=kinds).status == "completed"


def test_what_one_run_brought_along_does_not_hold_for_the_next() -> None:
    kinds = {f"{__name__}:Busy": "transient"}
    assert Execution().run(busy(1), kinds=kinds).status == "completed"
    assert Execution().run(busy(1)).status == "failed"


def test_a_runs_own_registration_wins_over_that_of_the_process() -> None:
    register_kind(Busy, "permanent")
    assert Execution().run(busy(1), kinds={f"{__name__}:Busy": "transient"}).status == "completed"
