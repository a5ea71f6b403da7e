"""How the breakers and retry budgets of the cluster stand, for the metrics: asked every few seconds, by one thread.

Started by `controller` where metrics are asked for; calls the breakers' and budgets' actors. Fault: an actor does not
answer: its values are left out until it does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray

from pyworkflow_ray.observability.otel_settings import signals
from pyworkflow_ray.resilience.breaker import BreakerState, View
from pyworkflow_ray.runtime import breaker_actor, budget_actor
from pyworkflow_ray.runtime.messages import NAMESPACE, RuntimeConfig

log = logging.getLogger("pyworkflow_ray.controller")

PERIOD_S = 5.0
ANSWER_S = 5.0

Gauges = dict[str, list[tuple[float, dict[str, Any]]]]
Change = tuple[str, str | None, str, str]  # breaker, key, from, to


def watch_gauges(config: RuntimeConfig, say: Callable[[dict[str, Any]], None]) -> None:
    """Have them asked for as long as this process lives; not at all where no metrics are asked for."""
    if signals(dict(config.telemetry)).metrics:
        threading.Thread(target=_loop, args=(say,), name="gauges", daemon=True).start()


def _loop(say: Callable[[dict[str, Any]], None]) -> None:
    known: dict[Change, tuple[str, int]] = {}
    pause = threading.Event()
    while True:
        try:
            say(collect(known))
        except Exception as error:
            log.debug("breakers and budgets can't be asked: %s", error)
        pause.wait(PERIOD_S)


def collect(known: dict[Change, tuple[str, int]]) -> dict[str, Any]:
    """All gauges, and the changes of breakers since the last call. `known` is what was counted before, by change: the
    start of the breaker's actor, and its count."""
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == NAMESPACE]
    gauges: Gauges = {
        "pyworkflow.breaker.state": [],
        "pyworkflow.breaker.failures": [],
        "pyworkflow.budget.tokens": [],
        "pyworkflow.budget.limit": [],
    }
    counts: list[tuple[str, float, dict[str, Any]]] = []
    for name in sorted(names):
        try:
            if name.startswith(breaker_actor.actor_name("")):
                _breaker(name, gauges, counts, known)
            elif name.startswith(budget_actor.actor_name("")):
                _budget(name, gauges)
        except (ray.exceptions.RayError, ValueError) as error:
            log.debug("%s does not answer: %s", name, error)
    return {"gauges": gauges, "counts": counts}


def _breaker(actor_name: str, gauges: Gauges, counts: list[Any], known: dict[Change, tuple[str, int]]) -> None:
    actor: Any = ray.get_actor(actor_name, namespace=NAMESPACE)
    answers: Any = ray.get([actor.snapshot.remote(), actor.transitions.remote()], timeout=ANSWER_S)
    views: list[tuple[str | None, View]] = answers[0]
    start, changes = answers[1]
    name = actor_name.removeprefix(breaker_actor.actor_name(""))
    for key, view in views:
        about = _about(name, key)
        gauges["pyworkflow.breaker.failures"].append((view.failures, about))
        for state in BreakerState:
            shown = {**about, "pyworkflow.state": str(state)}
            gauges["pyworkflow.breaker.state"].append((float(view.state is state), shown))
    for key, old, new, number in changes:
        before_start, before = known.get((name, key, old, new), (start, 0))
        known[name, key, old, new] = (start, number)
        more = number - before if before_start == start else number
        if more > 0:
            about = {**_about(name, key), "pyworkflow.from": old, "pyworkflow.to": new}
            counts.append(("pyworkflow.breaker.transitions", more, about))


def _budget(actor_name: str, gauges: Gauges) -> None:
    actor: Any = ray.get_actor(actor_name, namespace=NAMESPACE)
    answer: Any = ray.get(actor.look.remote(), timeout=ANSWER_S)
    settings, available, _ = answer
    about = {"pyworkflow.budget": actor_name.removeprefix(budget_actor.actor_name(""))}
    gauges["pyworkflow.budget.tokens"].append((available, about))
    gauges["pyworkflow.budget.limit"].append((settings["tokens"], about))


def _about(name: str, key: str | None) -> dict[str, Any]:
    return {"pyworkflow.breaker": name} if key is None else {"pyworkflow.breaker": name, "pyworkflow.key": key}
