"""`@workflow` and what it makes: bare and called, options of runs, and why it can't be called."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest

import pyworkflow_ray as pw


@pw.workflow
async def checkout(order: int, note: str = "") -> int:
    """Buys."""
    return order


def test_bare_and_called_keep_name_documentation_and_signature() -> None:
    called = pw.workflow(name="checkout-2", version="7", max_duration="1h")(checkout.fn)
    for flow in (checkout, called):
        assert (flow.__name__, flow.__doc__) == ("checkout", "Buys.")
        assert inspect.signature(flow) == inspect.signature(checkout.fn)  # type: ignore[arg-type]
    assert (called.definition.name, called.definition.version, called.definition.max_duration_s) == (
        "checkout-2",
        "7",
        3600.0,
    )


def test_call_outside_a_workflow_names_run() -> None:
    with pytest.raises(TypeError, match=r"pw\.run\(checkout, \.\.\.\)") as caught:
        checkout(1)
    assert type(caught.value) is TypeError


def test_call_inside_a_workflow_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pyworkflow_ray.workflow"], "current_workflow", object)
    with pytest.raises(pw.ConfigurationError, match="child runs are not available in this version"):
        checkout(1)


def test_options_of_a_run_are_a_changed_copy() -> None:
    one = checkout.options(run_id="order-42", attributes={"shop": "bern", "n": 1})
    two = one.options(version="8")
    assert (one.run_id, one.attributes) == ("order-42", {"shop": "bern", "n": 1})
    assert (two.run_id, two.definition.version, two.definition.name) == ("order-42", "8", checkout.definition.name)
    assert (checkout.run_id, checkout.attributes, checkout.definition.version) == (None, {}, None)
    assert one.definition is checkout.definition


@pytest.mark.parametrize("run_id", ["", "-x", ".x", "a/b", "a b", "x" * 129, "é", 5, "a\n"])
def test_bad_run_id_is_refused(run_id: Any) -> None:
    with pytest.raises(pw.ConfigurationError, match="run_id="):
        checkout.options(run_id=run_id)


@pytest.mark.parametrize("attributes", [5, ["a"], {1: 2}, {"": 1}, {"a": object()}, {"a": float("nan")}])
def test_bad_attributes_are_refused(attributes: Any) -> None:
    with pytest.raises(pw.ConfigurationError, match="attributes="):
        checkout.options(attributes=attributes)


def test_attributes_are_a_copy() -> None:
    given = {"tags": ["a"]}
    flow = checkout.options(attributes=given)
    given["tags"].append("b")
    assert flow.attributes == {"tags": ["a"]}


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(pw.ConfigurationError, match="Did you mean 'run_id'"):
        checkout.options(runid="x")


def test_remote_names_start() -> None:
    with pytest.raises(pw.ConfigurationError, match=r"pw\.start\(checkout, \.\.\.\)"):
        checkout.remote(1)
