"""A recording as one animated SVG: no script, no font, no other file, so that GitHub shows it in a README.

The terminal is pyte's. Each state of the screen that stays long enough to be seen is a frame; frames stand side by side
on a strip that CSS moves behind the window. Rows that are equal are written once. Where animations are not wanted
(`prefers-reduced-motion`) the last frame is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

import pyte
from cast import Recording

CELL_W, CELL_H, FONT = 8.4, 18, 14
PAD, BAR = 14, 34
FRAME_S = 0.2  # no frame is shown for less
LAST_S = 6.0
COLOURS = {
    "default": "#d7dce4", "black": "#5b6370", "red": "#ff7b72", "green": "#56d364", "brown": "#e3b341",
    "blue": "#79c0ff", "magenta": "#d2a8ff", "cyan": "#76e3ea", "white": "#ffffff",
}  # fmt: skip
DIM = "#8b949e"

Row = tuple[tuple[str, str, bool], ...]  # runs of text, colour, bold
Frame = tuple[Row, ...]


def draw(recording: Recording, speed: float = 1.0) -> str:
    """The recording, shown `speed` times as fast as it was, again and again."""
    frames = list(screens(recording, speed))
    ids: dict[Row, str] = {}
    for _, frame in frames:
        for row in frame:
            ids.setdefault(row, f"r{len(ids)}")
    width = round(recording.columns * CELL_W + 2 * PAD)
    height = recording.rows * CELL_H + BAR + PAD
    total = frames[-1][0] + LAST_S
    moves = "".join(f"{at / total:.4%}{{transform:translateX({-width * n}px)}}" for n, (at, _) in enumerate(frames))
    last = f"transform:translateX({-width * (len(frames) - 1)}px)"
    fast = "" if speed == 1 else f", {speed:g} times as fast"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="t d"><title id="t">{escape(recording.command)}: a recorded run{fast}</title>',
        f'<desc id="d">{escape(said(frames[-1][1]))}</desc>',
        "<style>text{white-space:pre;font:"
        f"{FONT}px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}}.b{{font-weight:700}}"
        f"#s{{{last};animation:p {total:.2f}s step-end infinite}}@keyframes p{{{moves}}}"
        f"@media(prefers-reduced-motion:reduce){{#s{{animation:none}}}}</style>",
        "<defs>",
        *(f'<g id="{name}">{row_svg(row)}</g>' for row, name in ids.items() if row),
        "</defs>",
        f'<rect width="{width}" height="{height}" rx="10" fill="#0d1117"/>',
        *(
            f'<circle cx="{18 + 18 * n}" cy="17" r="5.5" fill="{c}"/>'
            for n, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
        f'<text x="{width - PAD}" y="21" text-anchor="end" fill="{DIM}" font-size="12">recorded{fast}</text>',
        f'<svg y="{BAR}" width="{width}" height="{height - BAR}"><g id="s">',
    ]
    for number, (_, frame) in enumerate(frames):
        used = [
            f'<use href="#{ids[row]}" x="{width * number + PAD}" y="{CELL_H * line}"/>'
            for line, row in enumerate(frame)
            if row
        ]
        parts.append(f"<g>{''.join(used)}</g>")
    return "".join([*parts, "</g></svg></svg>\n"])


def screens(recording: Recording, speed: float) -> Iterator[tuple[float, Frame]]:
    """When each frame begins, in seconds as shown, and what it shows. The first has the command alone."""
    screen = pyte.Screen(recording.columns, recording.rows)
    stream = pyte.Stream(screen)
    stream.feed(f"\x1b[1;32m$\x1b[0m {recording.command}\r\n")
    shown_at, shown = 0.0, picture(screen)
    yield shown_at, shown
    # What is printed while a frame is still too new to go is shown with the next one.
    for at, together in groupby(recording.events, key=lambda event: int(event[0] / speed / FRAME_S) + 1):
        for _, text in together:
            stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
        seen = picture(screen)
        if seen != shown:
            shown_at, shown = at * FRAME_S, seen
            yield shown_at, shown


def picture(screen: pyte.Screen) -> Frame:
    rows = []
    for line in range(screen.lines):
        cells = [screen.buffer[line][column] for column in range(screen.columns)]
        runs = [
            ("".join(cell.data for cell in group), colour, bold)
            for (colour, bold), group in (
                (key, list(group)) for key, group in groupby(cells, key=lambda cell: (colour_of(cell), cell.bold))
            )
        ]
        while runs and not runs[-1][0].strip():
            runs.pop()
        rows.append(tuple(runs))
    return tuple(rows)


def colour_of(cell: pyte.screens.Char) -> str:
    if not cell.data.strip():
        return COLOURS["default"]
    return COLOURS.get(cell.fg.removeprefix("bright"), f"#{cell.fg}" if len(cell.fg) == 6 else COLOURS["default"])


def row_svg(row: Row) -> str:
    column = 0
    parts = []
    for text, colour, bold in row:
        ahead = len(text) - len(text.lstrip())
        words = text.strip()
        if words:
            x, length = (column + ahead) * CELL_W, len(words) * CELL_W
            weight = ' class="b"' if bold else ""
            parts.append(
                f'<text x="{x:.1f}" y="{FONT}" textLength="{length:.1f}" fill="{colour}"{weight}>{escape(words)}</text>'
            )
        column += len(text)
    return "".join(parts)


def said(frame: Frame) -> str:
    """A frame as text, for who listens instead of looking."""
    return "\n".join("".join(text for text, _, _ in row).rstrip() for row in frame if row)
