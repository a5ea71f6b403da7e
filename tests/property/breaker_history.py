"""A breaker of every mode told as a history: an oracle with neither table nor counters.

It keeps the phases, and of the phase that runs what has ended in it, and computes all else from that list whenever it
is asked, by the sentences of docs/breakers.md. It shares no code with `pyworkflow_ray.resilience`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class End:
    at: float
    failed: bool
    slow: bool
    node: str


@dataclass
class Phase:
    kind: str
    since: float
    open_s: float = 0.0
    ends: list[End] = field(default_factory=list)
    probes: dict[int, float] = field(default_factory=dict)  # call number: until when its holder may be silent
    proofs: int = 0
    halvings: list[float] = field(default_factory=list)
    ramp_from: float | None = None
    window_from: int = 0  # ends before it are in no window: it became another


class History:
    """rules: the constructor's options. Calls are numbered by whoever makes them."""

    def __init__(self, rules: dict[str, Any], lease: float) -> None:
        self.rules, self.lease = dict(rules), lease
        self.phases = [Phase("closed", 0.0)]
        self.bad_probes = 0  # in a row

    @property
    def now_in(self) -> Phase:
        return self.phases[-1]

    def to(self, kind: str, at: float) -> Phase:
        self.phases.append(Phase(kind, at))
        return self.now_in

    def at(self, now: float) -> Phase:
        lost = [until for until in self.now_in.probes.values() if until <= now]
        if self.now_in.kind == "half_open" and lost:
            self.reopen(min(lost))
        if self.now_in.ramp_from is not None and self.share(now) >= 1:
            self.now_in.ramp_from = None
        return self.now_in

    def reopen(self, at: float) -> None:
        self.bad_probes += 1
        self.to("open", at).open_s = self.open_time()

    def open_time(self) -> float:
        base, factor = self.rules["recovery_timeout"], self.rules["recovery_backoff"]
        longest = self.rules["max_recovery_timeout"] or (max(base, 3600.0) if factor > 1 else base)
        return min(longest, base * factor**self.bad_probes)

    def share(self, now: float) -> float:
        """Of a ramp: additive increase, halved by each failure."""
        phase = self.now_in
        assert phase.ramp_from is not None
        share, at = 0.05, phase.ramp_from
        for failed_at in [*phase.halvings, None]:
            until = now if failed_at is None else failed_at
            share, at = min(1.0, share + 0.95 * (until - at) / self.rules["ramp"]), until
            if failed_at is not None:
                share = max(0.05, share / 2)
        return share

    # What happens ---------------------------------------------------------------------------------------------------

    def ask(self, call: int, now: float) -> str:
        """ "through", "probe", "refused"; "ramp" where a ramp may refuse or let through."""
        phase = self.at(now)
        if phase.kind == "forced_closed":
            return "through"
        if phase.kind == "closed":
            return "through" if phase.ramp_from is None else "ramp"
        if phase.kind == "forced_open" or (phase.kind == "open" and now < phase.since + phase.open_s):
            return "refused"
        if phase.kind == "open":
            phase = self.to("half_open", now)
        if len(phase.probes) >= self.rules["half_open_max_calls"]:
            return "refused"
        phase.probes[call] = now + self.lease
        return "probe"

    def renew(self, call: int, generation: int, now: float) -> bool:
        phase = self.at(now)
        if generation != len(self.phases) - 1 or call not in phase.probes:
            return False
        phase.probes[call] = now + self.lease
        return True

    def end(self, call: int, generation: int, how: str, slow: bool, node: str, now: float) -> None:
        phase = self.at(now)
        if generation != len(self.phases) - 1:
            return
        slow_is_failure = self.rules["slow_call_rate"] is None or phase.kind == "half_open"
        failed = how == "failure" or (slow and how != "release" and slow_is_failure)
        if phase.kind == "half_open":
            del phase.probes[call]
            if failed:
                self.reopen(now)
            elif how != "release":
                phase.proofs += 1
                if phase.proofs >= self.rules["success_threshold"]:
                    self.bad_probes = 0
                    closed = self.to("closed", now)
                    closed.ramp_from = None if self.rules["ramp"] is None else now
        elif phase.kind == "closed" and how != "release" and (failed or how == "success" or slow):
            phase.ends.append(End(now, failed, slow, node))
            if self.trips(now):
                self.to("open", now).open_s = self.open_time()
            elif failed and phase.ramp_from is not None:
                phase.halvings.append(now)

    def force(self, kind: str, now: float) -> None:
        if self.at(now).kind != kind or kind == "closed":
            self.bad_probes = 0
            self.to(kind, now)

    def configure(self, changes: dict[str, Any], now: float) -> None:
        phase = self.at(now)
        if changes.get("window", self.rules["window"]) != self.rules["window"]:
            phase.window_from = len(phase.ends)
        self.rules.update(changes)
        if phase.kind == "open":
            phase.open_s = self.open_time()
        if self.rules["ramp"] is None:
            phase.ramp_from = None

    # What is judged -------------------------------------------------------------------------------------------------

    @property
    def windowed(self) -> bool:
        return self.rules["failure_rate"] is not None or self.rules["slow_call_rate"] is not None

    def in_window(self, now: float) -> list[End]:
        window, ends = self.rules["window"], self.now_in.ends[self.now_in.window_from :]
        return ends[-window:] if isinstance(window, int) else [e for e in ends if now - e.at < window]

    def streak(self) -> list[End]:
        """The failures since the last success."""
        ends = self.now_in.ends
        successes = [n for n, end in enumerate(ends) if not end.failed]
        return ends[successes[-1] + 1 if successes else 0 :]

    def trips(self, now: float) -> bool:
        rules, ends, streak = self.rules, self.in_window(now), self.streak()
        failures = sum(end.failed for end in ends)
        slow = sum(end.slow for end in ends)
        tripping = False
        if self.windowed and len(ends) >= rules["minimum_calls"]:
            tripping = rules["failure_rate"] is not None and failures >= rules["failure_rate"] * len(ends)
            tripping |= rules["slow_call_rate"] is not None and slow >= rules["slow_call_rate"] * len(ends)
        if rules["failure_rate"] is None and self.now_in.ends[-1].failed:
            tripping |= len(streak) >= rules["failure_threshold"]
        bad = [e for e in ends if e.failed or e.slow] if self.windowed else streak
        return tripping and len({end.node for end in bad}) >= rules["min_nodes"]
