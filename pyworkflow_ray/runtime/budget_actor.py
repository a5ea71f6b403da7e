"""The named actor that holds a retry budget's bucket, and how the processes of the cluster come to it.

Loaded by every process of ours (`process`); called through `execution.budgets`. Calls the pure `resilience.budget`, of
which the actor and the links are thin shells: they add Ray, and waiting.

Faults: the actor dies (it is restarted, with a full bucket: at most one bucket more is spent) or does not answer within
`WAIT_S` (the share goes on with what it has, and on credit of a tenth of the bucket); a process dies with its share.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import ray

from pyworkflow_ray.execution import budgets
from pyworkflow_ray.execution.budgets import Budget, Declared
from pyworkflow_ray.resilience.budget import Ask, Bucket, BudgetSettings, Share
from pyworkflow_ray.runtime.breaker_link import session_id

log = logging.getLogger("pyworkflow_ray.budget")

NAMESPACE = "pyworkflow_ray"
WAIT_S = 2.0
MAKE_WAIT_S = 15.0  # an actor's process takes a second to start, more on a busy machine


class BudgetActor:
    """The one holder of a budget's bucket."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._name = name
        self._bucket = Bucket(BudgetSettings.model_validate(options))
        self.calls = 0

    def __repr__(self) -> str:
        return f"budget({self._name})"

    def exchange(self, ask: Ask, options: dict[str, Any]) -> float:
        """Take back, and give a share. The settings of whoever asked last hold."""
        self.calls += 1
        settings = BudgetSettings.model_validate(options)
        if settings != self._bucket.settings:
            log.warning(
                "retry budget %r: its settings change from %s to %s", self._name, self._bucket.settings, settings
            )
            self._bucket.configure(settings)
        return self._bucket.exchange(ask.returned, ask.wants)

    def look(self) -> tuple[dict[str, Any], float, int]:
        """Settings, tokens that no process holds, messages so far."""
        return self._bucket.settings.model_dump(), self._bucket.available, self.calls


def actor_name(name: str) -> str:
    return f"budget:{name}"


def find(name: str) -> Any | None:
    try:
        return ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def _make(name: str, options: dict[str, Any]) -> Any:
    return (
        ray.remote(BudgetActor)
        .options(
            name=actor_name(name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            enable_task_events=False,
        )
        .remote(name, options)
    )


class Link:
    """This process's share of one budget of the cluster (protocol `Budget`)."""

    def __init__(self, declaration: Declared, session: str) -> None:
        self.name = declaration.name
        self.session = session
        self._options = declaration.settings.model_dump()
        self._share = Share(declaration.settings)
        self._lock = threading.Lock()
        self._actor: Any = None
        self._made = False
        self._warned = False
        threading.Thread(target=self._meet, name="pyworkflow-ray budget", daemon=True).start()

    def retry(self, throttled: bool) -> bool:
        with self._lock:  # others wait for one answer: it is for them as well
            answer = self._share.retry(throttled)
            if isinstance(answer, bool):
                return answer
            granted = self._send(answer)
            if granted is None:
                return self._share.unanswered(answer, throttled)
            self._share.granted(granted)
            return self._share.spend(throttled)

    def success(self) -> None:
        with self._lock:
            ask = self._share.success()
        if ask is not None:
            threading.Thread(target=self._give_back, args=(ask,), name="pyworkflow-ray budget", daemon=True).start()

    def _give_back(self, ask: Ask) -> None:
        granted = self._send(ask)
        with self._lock:
            if granted is None:
                self._share.unanswered(ask)
            else:
                self._share.granted(granted)

    def _meet(self) -> None:
        """Find or make the actor while the first attempt runs; a step's success or first retry need not wait for it."""
        try:
            self._actor = find(self.name) or _make(self.name, self._options)
            ray.get(self._actor.look.remote(), timeout=MAKE_WAIT_S)
            self._made = True
        except Exception as error:
            log.debug("retry budget %r: its actor could not be made: %s", self.name, error)

    def _send(self, ask: Ask) -> float | None:
        try:
            if self._actor is None:
                self._actor = find(self.name) or _make(self.name, self._options)
            wait_s = WAIT_S if self._made else MAKE_WAIT_S
            granted: float = ray.get(self._actor.exchange.remote(ask, self._options), timeout=wait_s)
        except Exception as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "retry budget %r: its actor does not answer (%s); going on with this share", self.name, error
                )
            self._actor = None
            return None
        self._made, self._warned = True, False
        return granted


_links: dict[str, Link] = {}
_lock = threading.Lock()


def link_for(declaration: Declared) -> Budget | None:
    """This process's share of the cluster's budget; None where Ray is not initialised here."""
    session = session_id()
    if session is None:
        return None
    with _lock:
        link = _links.get(declaration.name)
        if link is None or link.session != session:
            link = _links[declaration.name] = Link(declaration, session)
        return link


def settings_of(name: str) -> dict[str, Any] | None:
    """The settings of the living actor of this name."""
    actor = find(name) if session_id() is not None else None
    if actor is None:
        return None
    options: dict[str, Any] = ray.get(actor.look.remote(), timeout=WAIT_S)[0]
    return options


def _forget_links() -> None:
    global _lock
    _links.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_links)
budgets.cluster, budgets.cluster_settings = link_for, settings_of
