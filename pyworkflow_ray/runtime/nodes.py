"""What is asked of nodes: whether each sees the storage, and what became of one.

`check_nodes` is called by `client` as it connects: a marker that the driver writes and each node looks for. A path can
exist on each node and be another directory on each: a local disk, a home that is not shared. A run actor or step there
would find no storage, or another. Such a cluster is refused at once, by the name of path and node, as Ray Train does.
Nodes that were found good are remembered by the cluster (its key-value store), so later drivers ask only those that
have come since.
`fate` is called by `dispatcher`, `was_drained` by `run_actor`, to tell a run's or step's own doing from its node's.

Faults: a node dies or is slow to answer (it is logged and left alone: the first step there would tell).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from pathlib import Path
from typing import Any, Literal

import ray
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.runtime.typed_ray import all_nodes, as_task, draining_nodes, living_nodes

log = logging.getLogger("pyworkflow_ray")

_ANSWER_S = 60.0
_KEY = "pyworkflow_ray:seen:"
_CONNECT_S = 1.0
_DRAINED = (3, 4)  # NodeDeathInfo.Reason in Ray's gcs.proto: drained because preempted, because idle

Fate = Literal["lives", "drained", "gone"]


def fate(node_id: str) -> Fate:
    """What became of a node: "drained" where that was asked for, even if it still lives.

    Ray counts a node as alive until its health checks have failed (15 s by default), but tells at once that an actor
    on it has died. Its raylet is asked: no connection within a second means that the node is gone. May wait so long.
    """
    if was_drained(node_id):
        return "drained"
    node = _find(node_id)
    if node is None or not node.get("Alive"):
        return "gone"
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _CONNECT_S).close()
    except OSError:
        return "gone"
    return "lives"


def was_drained(node_id: str) -> bool:
    """Whether somebody has asked for the end of this node: a drain, a preemption."""
    if node_id in draining_nodes():  # asked first: a node that ends meanwhile leaves these for the table of the dead
        return True
    node = _find(node_id)
    return node is not None and node.get("DeathReason") in _DRAINED


def _find(node_id: str) -> dict[str, Any] | None:
    return next((node for node in all_nodes() if node.get("NodeID") == node_id), None)


def check_nodes(root: str, storage_id: str) -> None:
    """Refuse a storage that is a directory of one node, where the cluster has several.

    Raises:
        ConfigurationError: a node does not see the driver's directory; path and node are named.
    """
    if "://" in root:
        return  # a bucket is nowhere in particular
    nodes = {str(node["NodeID"]): node for node in living_nodes()}
    good = _known(storage_id, root)
    asked = {node_id: node for node_id, node in nodes.items() if node_id not in good}
    if len(nodes) < 2 or not asked:
        return
    marker = f"{root}/tmp/seen-{uuid.uuid4().hex}"
    Path(marker).parent.mkdir(mode=0o700, exist_ok=True)
    Path(marker).write_text(storage_id)
    try:
        blind, seeing = _ask(marker, storage_id, asked)
    finally:
        Path(marker).unlink(missing_ok=True)
    if blind:
        node_id, why = next(iter(blind.items()))
        more = f" (and {len(blind) - 1} more)" if len(blind) > 1 else ""
        raise ConfigurationError(
            f"storage={root!r} is not shared by all nodes of the cluster: node {node_id[:12]} "
            f"({nodes[node_id].get('NodeManagerAddress', '?')}){more} {why}. Runs and steps execute on every node, so "
            "each must reach the storage"
        )
    internal_kv._internal_kv_put(_key(storage_id, root), json.dumps(sorted(good | seeing)).encode())


def _ask(marker: str, storage_id: str, nodes: dict[str, dict[str, Any]]) -> tuple[dict[str, str], set[str]]:
    """Nodes that do not see the marker, and what they see instead; and those that see it."""
    look = {
        as_task(
            _look,
            num_cpus=0,
            max_retries=0,
            enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(marker, storage_id): node_id
        for node_id in nodes
    }
    answered, silent = ray.wait(list(look), num_returns=len(look), timeout=_ANSWER_S)
    for ref in silent:
        log.warning("node %s has not said within %.0f s whether it sees the storage", look[ref][:12], _ANSWER_S)
    blind, seeing = {}, set()
    for ref in answered:
        try:
            why = ray.get(ref)
        except Exception as error:
            log.warning("node %s could not say whether it sees the storage: %s", look[ref][:12], type(error).__name__)
            continue
        if why:
            blind[look[ref]] = why
        else:
            seeing.add(look[ref])
    return blind, seeing


def _look(marker: str, storage_id: str) -> str:
    root = os.path.dirname(os.path.dirname(marker))
    try:
        with open(marker, encoding="utf-8") as file:
            return "" if file.read() == storage_id else "sees another directory there"
    except FileNotFoundError:
        return "sees another directory there" if os.path.isdir(root) else "has no such directory"
    except OSError as error:
        return f"can't read it ({error})"


def _known(storage_id: str, root: str) -> set[str]:
    data = internal_kv._internal_kv_get(_key(storage_id, root))
    return set(json.loads(data)) if data else set()


def _key(storage_id: str, root: str) -> bytes:
    return f"{_KEY}{storage_id}:{root}".encode()
