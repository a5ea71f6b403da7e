"""The breakers of a running cluster, for people: which there are, and to open, close and reset them.

Called by the command line and by `breakers`; calls the breakers' actors, and makes none. Faults: no cluster is running,
or a breaker of this name has no actor (no process has used it): both are said. An actor that does not answer is left
out of a list and named.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import ray

from pyworkflow_ray.errors import ConfigurationError, PyWorkflowError
from pyworkflow_ray.resilience.breaker import BreakerEvent, View
from pyworkflow_ray.resilience.breaker_settings import BreakerSettings, split_name
from pyworkflow_ray.resilience.mirror import Message
from pyworkflow_ray.runtime.breaker_actor import NAMESPACE, actor_name

ANSWER_S = 15.0
_PREFIX = actor_name("")


@dataclass(frozen=True, slots=True)
class BreakerRow:
    """A breaker, or a key of one, as its actor has it. settings: in force."""

    name: str
    key: str | None
    view: View
    settings: BreakerSettings


def connect(address: str | None, options: dict[str, Any] | None = None) -> None:
    """Connect to a Ray cluster that runs, with these options of `ray.init`; start none.

    Raises:
        ConfigurationError: none runs, or nobody answers at the address.
    """
    from pyworkflow_ray.runtime.embedded import ensure_ray

    if ray.is_initialized():
        return
    if address or os.environ.get("RAY_ADDRESS"):
        ensure_ray(address, options)
        return
    try:
        ensure_ray("auto", options)
    except ConfigurationError:
        raise ConfigurationError(
            "no Ray cluster is running here, so no breaker is in force: give --address of one that runs elsewhere"
        ) from None


def rows(name: str | None = None, answer_s: float = ANSWER_S) -> tuple[list[BreakerRow], list[str]]:
    """All breakers, or one with its keys; and the names of those whose actor does not answer."""
    names = [
        actor["name"].removeprefix(_PREFIX)
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX)
    ]
    found, silent = [], []
    for one in sorted(names):
        if name is None or one == name:
            try:
                found += _rows_of(one, answer_s)
            except (ray.exceptions.RayError, ValueError):
                silent.append(one)
    return found, silent


def force(full: str, event: BreakerEvent) -> BreakerRow:
    """Force a breaker, or a key of one, open or closed, or reset it; returns it as it then is.

    Raises:
        PyWorkflowError: no such breaker is in the cluster, or its actor does not answer.
    """
    name, key = split_name(full)
    try:
        actor: Any = ray.get_actor(actor_name(name), namespace=NAMESPACE)
        options: Any = ray.get(actor.settings.remote(), timeout=ANSWER_S)
        declared = BreakerSettings.from_options(options)
        message = Message(f"cli-{uuid.uuid4().hex}", 1, declared, forces=(event,))
        replies: Any = ray.get(actor.exchange.remote([(key, message)]), timeout=ANSWER_S)
    except ValueError:
        raise PyWorkflowError(
            f"no circuit breaker {name!r} is in this cluster: no process has used it yet. See: breakers list"
        ) from None
    except ray.exceptions.RayError as error:
        raise PyWorkflowError(f"circuit breaker {name!r}: its actor does not answer ({type(error).__name__})") from None
    view: View = replies[0].view
    return BreakerRow(name, key, view, view.configured or declared)


def _rows_of(name: str, answer_s: float) -> list[BreakerRow]:
    actor: Any = ray.get_actor(actor_name(name), namespace=NAMESPACE)
    answers: Any = ray.get([actor.settings.remote(), actor.snapshot.remote()], timeout=answer_s)
    options, views = answers
    declared = BreakerSettings.from_options(options)
    ordered = sorted(views, key=lambda one: (one[0] is not None, one[0] or ""))
    return [BreakerRow(name, key, view, view.configured or declared) for key, view in ordered]
