"""cluster.yaml is what Ray's own launcher accepts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def ray_schema() -> dict[str, Any]:
    spec = importlib.util.find_spec("ray")  # found, not imported
    assert spec is not None
    assert spec.origin is not None
    schema: dict[str, Any] = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return schema


def test_cluster_yaml_is_valid_against_rays_schema() -> None:
    jsonschema.validate(yaml.safe_load((ROOT / "cluster.yaml").read_text()), ray_schema())


def test_a_misspelled_key_would_be_refused() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["max_worker"] = config.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(config, ray_schema())
