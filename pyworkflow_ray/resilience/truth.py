"""The one holder of a cluster's breaker: the machine, and the memory that makes messages safe to repeat. Pure.

`runtime.breaker_actor` is its shell; calls `breaker` and `waiters`; `mirror` is its counterpart in each process. Rules:

* a message is handled once: one whose answer was lost is answered from memory;
* what a process knows better (this holder was restarted) is taken over before anything is counted;
* with `min_nodes` every node has a breaker of its own beside the cluster's. It opens by its node's own failures, for
  its calls alone; the cluster's opens once failures come from so many nodes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pyworkflow_ray.resilience.breaker import (
    PERMIT_LEASE_S,
    Answer,
    Breaker,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    IllegalBreakerEvent,
    View,
)
from pyworkflow_ray.resilience.mirror import Asker, Message, Reply, Report
from pyworkflow_ray.resilience.waiters import Waiters

MAX_REMEMBERED_PROCESSES = 10_000


class Truth:
    """The breaker itself.

    Args:
        settings: The declared ones; senders' are compared with them.
        lineage: Identity of this holder and all its restarts.
    """

    def __init__(self, settings: BreakerSettings, lineage: str, *, lease_s: float = PERMIT_LEASE_S) -> None:
        self.declared = settings
        self.breaker = Breaker(settings, lease_s=lease_s)
        self.lineage = lineage
        self.heard = 0
        self.waiters = Waiters()
        self._recall = False  # a person has changed what waiters were told
        self._nodes: dict[str, Breaker] = {}
        self._replies: OrderedDict[str, tuple[int, Reply]] = OrderedDict()

    def handle(self, message: Message, now: float) -> Reply:
        """Take over what the sender knows better, its reports in their order, its renewals, then its questions."""
        conflict = self.declared.conflict(message.settings)
        if conflict is not None and message.settings.replaces(self.declared):
            self.declared = message.settings
            self.breaker.configure(asdict(message.settings), now)
        elif conflict is not None and not self.declared.replaces(message.settings):
            return Reply(self.view(now), conflict=conflict)
        known = self._replies.get(message.process)
        if known is not None and message.seq <= known[0]:
            # Its answer was lost; or it was overtaken by a repeated one, and nobody waits for its answer any more.
            return replace(known[1], view=self.view(now)) if message.seq == known[0] else Reply(self.view(now))
        self.meet(message.view, now)
        self.heard = max(self.heard, message.news)
        was_closed = self.breaker.view(now).state is BreakerState.CLOSED
        self._recall |= bool(message.forces or message.configure)
        for force in message.forces:
            self.breaker.force(force, now)
            self._nodes.clear()
        if message.configure is not None:
            self.breaker.configure(message.configure, now)
        for report in message.reports:
            self._report(report, message.node, now)
        opened = was_closed and self.breaker.state is BreakerState.OPEN
        for permit in message.renewals:
            self._renew(permit, message.node, now)
        answers = tuple(self._ask(asker, message.node, now) for asker in message.asks)
        reply = Reply(self.view(now), answers, opened=opened)
        self._replies[message.process] = (message.seq, reply)
        self._replies.move_to_end(message.process)
        if len(self._replies) > MAX_REMEMBERED_PROCESSES:
            self._replies.popitem(last=False)
        return reply

    def recalls(self, now: float) -> list[tuple[float, str, tuple[str, str]]]:
        """Who is to come earlier than it was told, since a person has changed the state or the settings: after so many
        seconds, its name among those who wait, storage and run."""
        if not self._recall:
            return []
        self._recall = False
        return self.waiters.recalled(self.breaker, now)

    def view(self, now: float) -> View:
        view = self.breaker.view(now)
        sick = tuple(
            (name, node.view(now)) for name, node in self._nodes.items() if node.state is not BreakerState.CLOSED
        )
        return replace(view, lineage=self.lineage, heard=max(self.heard, view.version), nodes=sick)

    def meet(self, view: View | None, now: float) -> None:
        """A process shows what it knows: taken over where this truth has forgotten it."""
        if view is None:
            return
        of_mine = view.lineage == self.lineage and view.version > self.breaker.version
        if of_mine or (view.lineage == "" and self.breaker.version == 0 and view.version > 0):
            self.breaker.adopt(view, now)

    @property
    def idle(self) -> bool:
        """Whether forgetting it loses nothing."""
        return self.breaker.idle and not self.waiters and not any(not node.idle for node in self._nodes.values())

    def restore(self, saved: Mapping[str, Any], age_s: float, now: float) -> None:
        """Take over what `save` gave, `age_s` seconds ago.

        Raises:
            KeyError, ValueError, TypeError: it is not what `save` gives.
        """
        state = BreakerState(saved["state"])
        rest = saved["open_for_s"]
        configured = saved.get("configured")
        view = View(
            version=int(saved["version"]),
            generation=int(saved["generation"]),
            state=state,
            failures=int(saved["failures"]),
            open_for_s=None if rest is None else max(0.0, float(rest) - max(0.0, age_s)),
            # a probe's holder may live, and renews; if not, its lease ends
            permits=tuple((int(permit), self.breaker.lease_s) for permit in saved["permits"]),
            reason=str(saved["reason"]),
            successes=int(saved["successes"]),
            failed_probes=int(saved["failed_probes"]),
            configured=None if configured is None else BreakerSettings.from_options(configured),
        )
        self.breaker.adopt(view, now)

    def save(self, now: float) -> dict[str, Any]:
        """The state in JSON types, for a holder that is restarted without anybody who knew it."""
        view = self.breaker.view(now)
        return {
            "version": view.version,
            "generation": view.generation,
            "state": view.state.value,
            "failures": view.failures,
            "open_for_s": view.open_for_s,
            "permits": [permit for permit, _ in view.permits],
            "reason": view.reason,
            "successes": view.successes,
            "failed_probes": view.failed_probes,
            "configured": None if view.configured is None else view.configured.as_options(),
        }

    # Inside -------------------------------------------------------------------------------------------------------

    def _ask(self, asker: Asker, node: str, now: float) -> Answer:
        answer = self.breaker.ask(now)
        own = self._nodes.get(node)
        if answer.admitted and answer.permit is None and own is not None:
            aside = own.ask(now)
            if aside.permit is not None:
                self.breaker.version += 1
            if not aside.admitted:
                answer = Answer(False, answer.generation, None, aside.retry_after_s)
            else:
                answer = answer._replace(aside=(aside.generation or 0, aside.permit))
        if asker.who:
            answer = self.waiters.answered(asker, answer, self.breaker, now)
        return answer

    def _report(self, report: Report, node: str, now: float) -> None:
        self._report_node(report, node, now)
        generation = report.generation
        if generation is None:
            # The call began before its process knew the cluster's breaker: it counts where calls pass freely.
            if self.breaker.view(now).state is not BreakerState.CLOSED:
                return
            generation = self.breaker.generation
        try:
            self.breaker.ended(
                report.event,
                now,
                generation=generation,
                permit=report.permit,
                error=report.error,
                slow=report.slow,
                count=report.count,
                node=node,
            )
        except IllegalBreakerEvent:
            # Only a truth that was restarted with an older state meets the end of a call that it never let through.
            # It says nothing about the state it has now, so it is dropped like a late one.
            return

    def _report_node(self, report: Report, node: str, now: float) -> None:
        """The same end for the breaker of the sender's node."""
        settings = self.breaker.settings
        if settings.min_nodes <= 1 or report.permit is not None:
            return
        own = self._nodes.get(node)
        if own is None:
            if report.event is not BreakerEvent.FAILURE and not settings.windowed:
                return
            own = self._nodes[node] = Breaker(replace(settings, min_nodes=1), lease_s=self.breaker.lease_s)
        own.settle(now)
        if report.aside is None and own.state is not BreakerState.CLOSED:
            return  # it was let through while the node was well
        generation, permit = report.aside or (own.generation, None)
        was = own.generation
        try:
            own.ended(
                report.event,
                now,
                generation=generation,
                permit=permit,
                error=report.error,
                slow=report.slow,
                count=report.count,
            )
        except IllegalBreakerEvent:
            return
        if own.generation != was or permit is not None:
            self.breaker.version += 1

    def _renew(self, permit: int, node: str, now: float) -> None:
        if not self.breaker.renew(permit, now) and node in self._nodes:
            self._nodes[node].renew(permit, now)
