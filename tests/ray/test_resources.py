"""Ray's options reach the step's task: CPUs, strategies, label selectors, runtime_env, memory."""

from __future__ import annotations

import pytest
import ray
import resource_flows

import pyworkflow_ray as pw

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("runtime")
def test_options_of_ray_reach_the_step() -> None:
    here = ray.get_runtime_context().get_node_id()
    places = pw.run(resource_flows.places, here)
    assert [node for node, _, _ in places] == [here] * 5
    assert [cpus for _, cpus, _ in places] == [0.5, 1.0, 0.5, 0.5, 0.5]
    assert [colour for _, _, colour in places] == ["", "", "", "green", ""]


@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
def test_a_runtime_env_that_cannot_be_built_fails_its_step() -> None:
    assert pw.run(resource_flows.nowhere) == "RuntimeEnvSetupError"
