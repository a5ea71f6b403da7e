"""The breaker's diagram as SVG, its edges read from the table that runs. On GitHub the page's Mermaid block is drawn.

Every ```mermaid block becomes this picture; tests/docs/test_pages.py holds the block itself to the same table.
"""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

from pyworkflow_ray.resilience.breaker_table import TABLE, BreakerEvent, BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
BY_HAND = {
    BreakerEvent.FORCE_OPEN: BreakerState.FORCED_OPEN,
    BreakerEvent.FORCE_CLOSED: BreakerState.FORCED_CLOSED,
    BreakerEvent.RESET: CLOSED,
}
# Middle of each state's box; from, to, and where an edge's words begin.
PLACES = {
    CLOSED: (95, 75),
    OPEN: (665, 75),
    HALF_OPEN: (380, 215),
    BreakerState.FORCED_CLOSED: (200, 350),
    BreakerState.FORCED_OPEN: (560, 350),
}
EDGES = {  # a curve, then the middle of the first line of its words
    (CLOSED, OPEN): ("M160,58 C300,20 460,20 596,58", 380, 8),
    (OPEN, HALF_OPEN): ("M690,99 C690,180 600,214 452,214", 580, 236),
    (HALF_OPEN, OPEN): ("M420,191 C450,130 540,90 596,84", 566, 146),
    (HALF_OPEN, CLOSED): ("M308,214 C150,214 80,170 82,103", 180, 236),
}


def words(start: BreakerState, end: BreakerState) -> list[str]:
    """What leads from one state to another by itself, equal conditions said once."""
    events: dict[str, list[str]] = {}
    for (state, event), rules in TABLE.items():
        for rule in rules:
            if state is start and rule.next is end and event not in BY_HAND:
                events.setdefault(rule.guard.value, []).append(event.value)
    return [
        line for guard, names in events.items() for line in (" or ".join(names) + (":" if guard else ""), guard) if line
    ]


def check() -> None:
    """The picture says of the forced states that they are reached from all others, and left by reset to closed."""
    for (_, event), rules in TABLE.items():
        if event in BY_HAND and {rule.next for rule in rules} != {BY_HAND[event]}:
            raise AssertionError(f"{event.value} does not always lead to {BY_HAND[event].value}: draw the diagram anew")
    drawn = {
        (state, rule.next)
        for (state, event), rules in TABLE.items()
        for rule in rules
        if rule.next is not state and event not in BY_HAND
    }
    if drawn != EDGES.keys():
        raise AssertionError(f"the diagram has edges {sorted(EDGES)}, the table {sorted(drawn)}: draw it anew")


def svg() -> str:
    """The picture, in the page's own colours."""
    check()
    parts = [
        '<svg viewBox="0 -8 760 403" role="img" aria-label="States of a circuit breaker" class="states">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
    ]
    for state, (x, y) in PLACES.items():
        parts.append(f'<rect x="{x - 72}" y="{y - 24}" width="144" height="48" rx="10"/>')
        parts.append(f'<text class="state" x="{x}" y="{y + 5}">{state.value}</text>')
    for (start, end), (curve, x, y) in EDGES.items():
        parts.append(f'<path class="edge" d="{curve}" marker-end="url(#tip)"/>')
        for number, line in enumerate(words(start, end)):
            parts.append(f'<text x="{x}" y="{y + 15 * number}">{escape(line)}</text>')
    parts.append('<line class="edge rule" x1="20" y1="284" x2="740" y2="284"/>')
    parts.append(
        '<text x="380" y="305">by hand, from every state: force_closed, force_open; reset leads to closed</text>'
    )
    return "".join([*parts, "</svg>"])


class Draw(SphinxTransform):
    default_priority = 300

    def apply(self, **kwargs: Any) -> None:
        for block in list(self.document.findall(nodes.literal_block)):
            if block.get("language") == "mermaid":
                block.replace_self(nodes.raw("", svg(), format="html"))


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(Draw)
    return {"parallel_read_safe": True}
