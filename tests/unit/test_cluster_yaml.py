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


def in_a_cloud() -> dict[str, Any]:
    """cluster.yaml with its provider, auth and node types taken from the comment, as the comment says."""
    text = (ROOT / "cluster.yaml").read_text()
    begin = text.index("# provider:\n")
    comment = text[begin : text.index("\n\n", begin)]
    config: dict[str, Any] = yaml.safe_load(text)
    cloud: dict[str, Any] = yaml.safe_load("\n".join(line.removeprefix("#")[1:] for line in comment.splitlines()))
    return {**config, **cloud}


def test_the_cloud_in_the_comments_is_valid_too() -> None:
    config = in_a_cloud()
    jsonschema.validate(config, ray_schema())
    assert config["provider"]["type"] == "aws"
    assert config["head_node_type"] in config["available_node_types"]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_nodes_are_started_with_tokens_and_this_package() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert list(config["file_mounts"]) == ["~/.ray/auth_token"]
    assert any("pyworkflow-ray" in command for command in config["setup_commands"])
