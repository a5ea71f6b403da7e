"""The manifests in docs/kuberay are what KubeRay's CRDs take: every field is known there and has its type."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHAPES = json.loads(Path(__file__).with_name("kuberay_shape.json").read_text())
MANIFESTS = sorted((ROOT / "docs" / "kuberay").glob("*.yaml"))
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "number": (int, float),
    "int-or-string": (int, str),
}


def problems(value: Any, shape: Any, where: str = "") -> list[str]:
    """What of `value` the CRD would refuse."""
    if shape in ("any", "object", "array"):
        return []
    if isinstance(shape, str):
        wrong = not isinstance(value, TYPES[shape]) or (isinstance(value, bool) and shape != "boolean")
        return [f"{where}: {value!r} is no {shape}"] if wrong else []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [line for i, item in enumerate(value) for line in problems(item, shape[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no mapping"]
    found = []
    for name, item in value.items():
        inner = shape.get(name, shape.get("*"))
        found += [f"{where}.{name}: unknown"] if inner is None else problems(item, inner, f"{where}.{name}")
    return found


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_field_of_a_manifest_is_known_and_has_its_type(path: Path) -> None:
    manifest = load(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert problems(manifest, SHAPES[manifest["kind"]]) == []


def test_a_wrong_field_would_be_found() -> None:
    manifest = load(ROOT / "docs" / "kuberay" / "raycluster.yaml")
    assert manifest["kind"] == "RayCluster"
    for spoil in (
        lambda m: m["spec"].update(rayVerion="2.60.0"),
        lambda m: m["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda m: m["spec"]["workerGroupSpecs"][0].update(replicas="1"),
        lambda m: m["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(env={"A": "1"}),
    ):
        spoiled = copy.deepcopy(manifest)
        spoil(spoiled)
        assert len(problems(spoiled, SHAPES["RayCluster"])) == 1


def test_the_manifests_belong_together() -> None:
    by_kind = {load(path)["kind"]: load(path) for path in MANIFESTS}
    assert set(by_kind) == {"RayCluster", "RayJob"}
    cluster, job = by_kind["RayCluster"], by_kind["RayJob"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["shutdownAfterJobFinishes"] is False  # runs outlive the job
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    storages = {
        variable["value"]
        for group in groups
        for container in group["template"]["spec"]["containers"]
        for variable in container["env"]
        if variable["name"] == "PYWORKFLOW_STORAGE"
    }
    assert len(storages) == 1
    assert storages == {yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["PYWORKFLOW_STORAGE"]}
    assert all("://" in storage for storage in storages)  # every node reaches it
