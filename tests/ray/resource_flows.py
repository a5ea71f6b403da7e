"""Steps that say where and how they are executed."""

from __future__ import annotations

import os

import ray

import pyworkflow_ray as pw


@pw.step(num_cpus=0.5)
def where() -> tuple[str, float, str]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_assigned_resources().get("CPU", 0.0), os.environ.get("COLOUR", "")


@pw.workflow
async def places(node_id: str) -> list[tuple[str, float, str]]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return [
        await where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))(),
        await where.options(scheduling_strategy="SPREAD", num_cpus=1)(),
        await where.options(ray_remote_args={"label_selector": {"ray.io/node-id": node_id}})(),
        await where.options(runtime_env={"env_vars": {"COLOUR": "green"}})(),
        await where.options(memory=10 * 2**20, memory_growth=2)(),
    ]


@pw.workflow
async def nowhere() -> str:
    """A runtime_env that can't be built fails its step, not the cluster."""
    try:
        await where.options(runtime_env={"working_dir": "gcs://_ray_pkg_unheard_of.zip"})()
    except Exception as error:
        return type(error).__name__
    return ""
