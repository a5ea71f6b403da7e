"""How the processes of a cluster share one breaker: `Truth` beside the machine, a `Mirror` in each process.

`runtime.breaker_actor` is the shell of Truth, `runtime.breaker_link` that of Mirror; both call `resilience.breaker`.

Rules:

* A closed mirror lets a call through by itself. An open one refuses by itself until the recovery timeout is over. All
  else asks the truth.
* A mirror has at most one message under way, and sends what has gathered meanwhile in the next: so outcomes are
  batched, and arrive in the order in which calls ended. A message whose answer was lost is sent again under the same
  number, and the truth answers a number that it knows from memory: nothing counts twice.
* A success is reported only where it changes something: while failures are counted, or for a probe.
* Every message carries the sender's view. A truth that lost its memory (its actor was restarted) takes over the newest
  view of its own lineage; one that is untouched takes over what a process had counted before there was a cluster.
* Versions are compared, clocks are not. `news` in a message is a version that the sender's run has heard of. The truth
  remembers the greatest (`View.heard`), so that one question answers it for good, even where that version was lost
  with a whole cluster.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
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

MAX_REMEMBERED_PROCESSES = 10_000


@dataclass(frozen=True, slots=True)
class Report:
    """The end of one call. generation: None where the call began before its process had joined the cluster."""

    event: BreakerEvent
    generation: int | None
    permit: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """From a mirror to the truth. `asks`: how many callers ask to be let through."""

    process: str
    seq: int
    settings: BreakerSettings
    view: View | None = None
    reports: tuple[Report, ...] = ()
    asks: int = 0
    renewals: tuple[int, ...] = ()
    news: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """From the truth to a mirror.

    conflict: option, the declared value, the sender's value; then nothing was done.
    opened: a report of this message opened the breaker, which had been closed.
    """

    view: View
    answers: tuple[Answer, ...] = ()
    conflict: tuple[str, Any, Any] | None = None
    opened: bool = False


class Truth:
    """The breaker itself, and the memory that makes messages safe to repeat."""

    def __init__(self, settings: BreakerSettings, lineage: str, *, lease_s: float = PERMIT_LEASE_S) -> None:
        self.breaker = Breaker(settings, lease_s=lease_s)
        self.lineage = lineage
        self.heard = 0
        self._replies: OrderedDict[str, tuple[int, Reply]] = OrderedDict()

    def handle(self, message: Message, now: float) -> Reply:
        """Take over what the sender knows better, its reports in their order, its renewals, then its questions."""
        conflict = self.breaker.settings.conflict(message.settings)
        if conflict is not None:
            return Reply(self.view(now), conflict=conflict)
        known = self._replies.get(message.process)
        if known is not None and known[0] == message.seq:  # its answer was lost
            return replace(known[1], view=self.view(now))
        self.meet(message.view, now)
        self.heard = max(self.heard, message.news)
        was_closed = self.breaker.view(now).state is BreakerState.CLOSED
        for report in message.reports:
            self._report(report, now)
        opened = was_closed and self.breaker.state is BreakerState.OPEN
        for permit in message.renewals:
            self.breaker.renew(permit, now)
        answers = tuple(self.breaker.ask(now) for _ in range(message.asks))
        reply = Reply(self.view(now), answers, opened=opened)
        self._replies[message.process] = (message.seq, reply)
        self._replies.move_to_end(message.process)
        if len(self._replies) > MAX_REMEMBERED_PROCESSES:
            self._replies.popitem(last=False)
        return reply

    def view(self, now: float) -> View:
        view = self.breaker.view(now)
        return replace(view, lineage=self.lineage, heard=max(self.heard, view.version))

    def meet(self, view: View | None, now: float) -> None:
        """A process shows what it knows: taken over where this truth has forgotten it."""
        if view is None:
            return
        of_mine = view.lineage == self.lineage and view.version > self.breaker.version
        if of_mine or (view.lineage == "" and self.breaker.version == 0 and view.version > 0):
            self.breaker.adopt(view, now)

    def _report(self, report: Report, now: float) -> None:
        generation = report.generation
        if generation is None:
            # The call began before its process knew the cluster's breaker: it counts where calls pass freely.
            if self.breaker.view(now).state is not BreakerState.CLOSED:
                return
            generation = self.breaker.generation
        try:
            self.breaker.ended(report.event, now, generation=generation, permit=report.permit, error=report.error)
        except IllegalBreakerEvent:
            # Only a truth that was restarted with an older state meets the end of a call that it never let through.
            # It says nothing about the state it has now, so it is dropped like a late one.
            return


@dataclass(frozen=True, slots=True)
class Known:
    """What a mirror knows; replaced as a whole, so that any thread may read it without a lock."""

    view: View
    joined: bool
    open_until: float


class Mirror:
    """One process's image of a breaker. `check` may be called by any thread, all else by one.

    Args:
        process: Name of this process, unique in the cluster.
        settings: As declared in this process.
        seed: What this process counted before it joined.
    """

    def __init__(self, process: str, settings: BreakerSettings, *, seed: View | None = None, now: float = 0.0) -> None:
        self.process = process
        self.settings = settings
        view = seed or View()
        self.known = Known(view, False, now + view.open_for_s)
        self.conflict: tuple[str, Any, Any] | None = None
        self._seq = 0
        self._reports: list[tuple[Report, Any]] = []
        self._asks: list[tuple[int, Any]] = []
        self._renewals: list[int] = []
        self._looks: list[tuple[int, Any]] = [(0, None)]  # a mirror begins with a look: so it joins
        self._under_way: tuple[Message, list[Any], list[Any]] | None = None

    # Local, without the truth -------------------------------------------------------------------------------------

    def check(self, now: float, news: int = 0) -> Answer | None:
        """Let through (closed), refused (open, and its time is not over), or None: ask the truth.

        news: the newest version that the caller's run has heard of; a mirror that is behind it asks.
        """
        known = self.known
        view = known.view
        if news > view.heard:
            return None
        if view.state is BreakerState.CLOSED:
            return Answer(True, view.generation if known.joined else None)
        if view.state is BreakerState.OPEN and now < known.open_until:
            return Answer(False, view.generation)
        return None

    def matters(self, event: BreakerEvent, permit: int | None) -> bool:
        """Whether the end of a call changes anything, as far as this mirror knows."""
        if permit is not None or event is BreakerEvent.FAILURE:
            return True
        return event is BreakerEvent.SUCCESS and self.known.view.failures > 0

    # Outgoing -----------------------------------------------------------------------------------------------------

    def report(self, report: Report, ticket: Any = None) -> None:
        """Queue the end of a call; `ticket` comes back from `receive` once the truth has counted it."""
        self._reports.append((report, ticket))

    def ask(self, ticket: Any, news: int = 0) -> None:
        """Queue a question; `receive` gives the ticket back with its answer."""
        self._asks.append((news, ticket))

    def look(self, ticket: Any = None, news: int = 0) -> None:
        """Queue a look at the state, which asks for no call."""
        self._looks.append((news, ticket))

    def renew(self, permit: int) -> None:
        self._renewals.append(permit)

    def next_message(self) -> Message | None:
        """The message to send now: the one under way again where its answer was lost, else what has gathered."""
        if self._under_way is not None:
            return replace(self._under_way[0], view=self.known.view)
        if not (self._reports or self._asks or self._renewals or self._looks):
            return None
        self._seq += 1
        message = Message(
            process=self.process,
            seq=self._seq,
            settings=self.settings,
            view=self.known.view,
            reports=tuple(report for report, _ in self._reports),
            asks=len(self._asks),
            renewals=tuple(self._renewals),
            news=max((news for news, _ in [*self._asks, *self._looks]), default=0),
        )
        told = [ticket for _, ticket in [*self._reports, *self._looks] if ticket is not None]
        self._under_way = (message, told, [ticket for _, ticket in self._asks])
        self._reports, self._asks, self._renewals, self._looks = [], [], [], []
        return message

    def abandon(self) -> list[Any]:
        """Give up: the tickets of all that waits. Nothing more is sent of it."""
        told = [ticket for _, ticket in [*self._reports, *self._looks] if ticket is not None]
        waiting = told + [ticket for _, ticket in self._asks]
        if self._under_way is not None:
            waiting += [*self._under_way[1], *self._under_way[2]]
        self._reports, self._asks, self._renewals, self._looks, self._under_way = [], [], [], [], None
        return waiting

    # Incoming -----------------------------------------------------------------------------------------------------

    def receive(self, reply: Reply, now: float) -> list[tuple[Any, Answer | None]]:
        """The answer to the message under way: tickets with their answers (None for reports and looks)."""
        if self._under_way is None:
            raise IllegalBreakerEvent("a reply without a message under way")
        _, told, asked = self._under_way
        self._under_way = None
        self.conflict = reply.conflict
        self.learn(reply.view, now)
        answers = reply.answers or tuple(Answer(False, reply.view.generation) for _ in asked)
        return [(ticket, None) for ticket in told] + list(zip(asked, answers, strict=True))

    def learn(self, view: View, now: float) -> bool:
        """Take a view of the truth over where it is newer, or of another lineage than ours. True where it was."""
        mine = self.known
        if mine.joined and view.lineage == mine.view.lineage and view.version < mine.view.version:
            return False
        self.known = Known(view, True, now + view.open_for_s)
        return True
