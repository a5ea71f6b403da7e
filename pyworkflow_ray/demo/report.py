"""The demo's verdict: event log and ledger put together.

Called by `main`, shown by `screen`; calls `tally` and `ledger`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyworkflow_ray.demo.ledger import Proof, read_ledger
from pyworkflow_ray.demo.tally import Kill, Role, Tally, tally, witnessed
from pyworkflow_ray.engine.events import Event

ROLES: tuple[Role, ...] = ("run actor", "step worker", "controller")
FULL_DEMO = 100


@dataclass(frozen=True)
class Report:
    """All that the demo says at its end.

    submitted: orders handed in; those without a history are lost. kills: proven ones, by kind. attempted: SIGKILLs
    that were sent, proven or not. example: a run that was taken up again after a kill, to look at.
    """

    submitted: int
    tally: Tally
    proof: Proof
    kills: Mapping[Role, int]
    attempted: int
    example: str | None

    @property
    def lost(self) -> int:
        """Orders that did not end, and completed ones that nobody charged."""
        return self.submitted - len(self.tally.completed) - len(self.tally.failed) + len(self.proof.uncharged)

    def faults(self) -> list[str]:
        """What speaks against the promise; empty where it was kept and put to the test."""
        found = [
            (self.lost, f"{self.lost} orders lost"),
            (self.proof.charged_twice, f"charged twice: {', '.join(self.proof.charged_twice)}"),
            (self.proof.overcharged, f"charged and yet failed: {', '.join(self.proof.overcharged)}"),
            (self.proof.wrong_amount, f"charged a wrong amount: {', '.join(self.proof.wrong_amount)}"),
            (self.tally.twice, f"steps completed twice: {', '.join(self.tally.twice)}"),
        ]
        if self.submitted >= FULL_DEMO:
            found += [(not self.kills[role], f"no {role} was killed in the middle of its work") for role in ROLES]
            found += [(not self.proof.repeated, "no request was ever repeated")]
        return [text for fault, text in found if fault]

    @property
    def proven(self) -> bool:
        return not self.faults()

    def figures(self) -> dict[str, Any]:
        """The figures for machines."""
        return {
            "orders": self.submitted,
            "completed": len(self.tally.completed),
            "failed": len(self.tally.failed),
            "retries": self.tally.retries,
            "recoveries": self.tally.recoveries,
            "kills": sum(self.kills.values()),
            "requests": self.proof.requests,
            "charges": self.proof.charges,
            "charged_twice": len(self.proof.charged_twice),
            "lost": self.lost,
            "seconds": round(self.tally.seconds, 1),
            "kills_by_kind": {role.replace(" ", "_"): self.kills[role] for role in ROLES},
            "repeated": self.proof.repeated,
            "failed_of": dict(Counter(self.tally.failed.values()).most_common()),
            "proven": self.proven,
        }


def report(histories: Mapping[str, Sequence[Event]], kills: Sequence[Kill], ledger: Path, submitted: int) -> Report:
    """Put together what the event log of each run (by run id) and the ledger say."""
    counted = tally(histories.values())
    proven = Counter(kill.role for kill in kills if witnessed(kill, histories))
    recovered = [run_id for run_id, history in histories.items() if tally([history]).recoveries]
    return Report(
        submitted=submitted,
        tally=counted,
        proof=read_ledger(ledger, counted.completed, counted.failed),
        kills=proven,
        attempted=len(kills),
        example=recovered[0] if recovered else next(iter(histories), None),
    )
