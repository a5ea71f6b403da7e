"""How the processes of a cluster share one breaker: what they say to its holder, and a `Mirror` in each of them.

`runtime.breaker_link` is the shell of Mirror; `resilience.truth` is the other side; both call `resilience.breaker`.

Rules:

* A closed mirror lets a call through by itself. An open one refuses by itself until the recovery timeout is over. All
  else asks the truth, and so do those who wait for it to let them through: it keeps their order.
* A mirror has at most one message under way, and sends what has gathered meanwhile in the next: so outcomes are
  batched, and arrive in the order in which calls ended. A message whose answer was lost is sent again under the same
  number, and the truth answers a number that it knows from memory: nothing counts twice.
* A success is reported only where it changes something: while failures are counted, for a probe, or where rates are
  judged; then many travel as one.
* Versions are compared, clocks are not. `news` in a message is a version that the sender's run has heard of. The truth
  remembers the greatest (`View.heard`), so that one question answers it for good, even where that version was lost
  with a whole cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pyworkflow_ray.resilience.breaker import (
    Answer,
    BreakerEvent,
    BreakerSettings,
    BreakerState,
    IllegalBreakerEvent,
    View,
)


@dataclass(frozen=True, slots=True)
class Report:
    """The end of one call, or of `count` calls in a row.

    generation: None where the call began before its process had joined the cluster. aside: of the answer that let it
    through. slow: it took as long as `slow_call_duration`, or longer.
    """

    event: BreakerEvent
    generation: int | None
    permit: int | None = None
    error: str = ""
    slow: bool = False
    count: int = 1
    aside: tuple[int, int | None] | None = None


class Asker(NamedTuple):
    """Who asks to be let through. who: of one who waits until then, its name; waited_s: for how long it has.

    run: by which storage and run it is called where it may come earlier than it was told.
    """

    who: str = ""
    waited_s: float = 0.0
    run: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """From a mirror to the truth. forces, configure: what a person wants."""

    process: str
    seq: int
    settings: BreakerSettings
    view: View | None = None
    reports: tuple[Report, ...] = ()
    asks: tuple[Asker, ...] = ()
    renewals: tuple[int, ...] = ()
    news: int = 0
    node: str = ""
    forces: tuple[BreakerEvent, ...] = ()
    configure: Mapping[str, Any] | None = None


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


@dataclass(frozen=True, slots=True)
class Known:
    """What a mirror knows; replaced as a whole, so that any thread may read it without a lock.

    free: calls pass without a question. open_until: before it calls are refused without one; None: for as long as the
    state lasts.
    """

    view: View
    joined: bool
    free: bool
    open_until: float | None


def _known(view: View, joined: bool, now: float, node: str) -> Known:
    mine = next((own for name, own in view.nodes if name == node), None)
    free = view.state is BreakerState.FORCED_CLOSED or (
        view.state is BreakerState.CLOSED and view.ramp is None and mine is None
    )
    shut = mine if mine is not None and view.state is BreakerState.CLOSED else view
    if shut.state is BreakerState.FORCED_OPEN:
        return Known(view, joined, free, None)
    opened = shut.state is BreakerState.OPEN
    return Known(view, joined, free, now + (shut.open_for_s or 0.0) if opened else now)


class Mirror:
    """One process's image of a breaker. `check` may be called by any thread, all else by one.

    Args:
        process: Name of this mirror, unique in the cluster.
        settings: As declared in this process.
        seed: What this process counted before it joined.
        node: The node it is on.
    """

    def __init__(
        self,
        process: str,
        settings: BreakerSettings,
        *,
        seed: View | None = None,
        now: float = 0.0,
        node: str = "",
    ) -> None:
        self.process = process
        self.settings = settings
        self.node = node
        self.known = _known(seed or View(), False, now, node)
        self.conflict: tuple[str, Any, Any] | None = None
        self._seq = 0
        self._reports: list[tuple[Report, Any]] = []
        self._asks: list[tuple[int, Any, Asker]] = []
        self._forces: list[BreakerEvent] = []
        self._configure: dict[str, Any] = {}
        self._renewals: list[int] = []
        self._looks: list[tuple[int, Any]] = [(0, None)]  # a mirror begins with a look: so it joins
        self._under_way: tuple[Message, list[Any], list[Any]] | None = None

    # Local, without the truth -------------------------------------------------------------------------------------

    @property
    def effective(self) -> BreakerSettings:
        """The settings in force, as far as this process knows."""
        return self.known.view.configured or self.settings

    @property
    def busy(self) -> bool:
        """Whether something is to be said, or was said and not answered yet."""
        waiting = self._reports or self._asks or self._renewals or self._looks
        return bool(waiting) or self._under_way is not None

    def check(self, now: float, news: int = 0, *, waits: bool = False) -> Answer | None:
        """Let through (closed), refused (open, and its time is not over), or None: ask the truth.

        news: the newest version that the caller's run has heard of; a mirror that is behind it asks.
        waits: the caller waits until it is let through, and wants its place among those who do.
        """
        known = self.known
        view = known.view
        if news > view.heard:
            return None
        if known.free:
            return Answer(True, view.generation if known.joined else None)
        until = known.open_until
        if not waits and (until is None or now < until):
            return Answer(False, view.generation, None, None if until is None else until - now)
        return None

    def matters(self, event: BreakerEvent, permit: int | None, *, slow: bool = False) -> bool:
        """Whether the end of a call changes anything, as far as this mirror knows."""
        view = self.known.view
        if view.state is BreakerState.FORCED_CLOSED and permit is None:
            return False
        if permit is not None or slow or event is BreakerEvent.FAILURE:
            return True
        return event is BreakerEvent.SUCCESS and (view.failures > 0 or self.effective.windowed or bool(view.nodes))

    # Outgoing -----------------------------------------------------------------------------------------------------

    def report(self, report: Report, ticket: Any = None) -> None:
        """Queue the end of a call; `ticket` comes back from `receive` once the truth has counted it."""
        self._reports.append((report, ticket))

    def ask(self, ticket: Any, news: int = 0, asker: Asker = Asker()) -> None:
        """Queue a question; `receive` gives the ticket back with its answer."""
        self._asks.append((news, ticket, asker))

    def force(self, event: BreakerEvent, ticket: Any = None) -> None:
        """Queue what a person wants."""
        self._forces.append(event)
        self.look(ticket)

    def configure(self, changes: Mapping[str, Any], ticket: Any = None) -> None:
        self._configure.update(changes)
        self.look(ticket)

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
            asks=tuple(asker for _, _, asker in self._asks),
            renewals=tuple(self._renewals),
            news=max([0, *(news for news, _, _ in self._asks), *(news for news, _ in self._looks)]),
            node=self.node,
            forces=tuple(self._forces),
            configure=self._configure or None,
        )
        told = [ticket for _, ticket in [*self._reports, *self._looks] if ticket is not None]
        self._under_way = (message, told, [ticket for _, ticket, _ in self._asks])
        self._reports, self._asks, self._renewals, self._looks = [], [], [], []
        self._forces, self._configure = [], {}
        return message

    def abandon(self) -> list[Any]:
        """Give up: the tickets of all that waits. Nothing more is sent of it."""
        told = [ticket for _, ticket in [*self._reports, *self._looks] if ticket is not None]
        waiting = told + [ticket for _, ticket, _ in self._asks]
        if self._under_way is not None:
            waiting += [*self._under_way[1], *self._under_way[2]]
        self._reports, self._asks, self._renewals, self._looks, self._under_way = [], [], [], [], None
        self._forces, self._configure = [], {}
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
        self.known = _known(view, True, now, self.node)
        return True
