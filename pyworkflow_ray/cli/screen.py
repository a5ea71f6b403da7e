"""What a stream can show: width, colour, characters. Every command prints through a `Screen`.

On a terminal tables fit its width by cutting the explaining columns; elsewhere rows are plain and never cut, for a
program or a person with `less -S` reads them. Glyphs that the stream's encoding lacks are replaced, not raised about.
Faults: a reader that has gone away (BrokenPipeError, ended quietly in main), a stream without an encoding.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from typing import IO, Any

from pyworkflow_ray.observability.text import RIGHT, columns
from pyworkflow_ray.observability.words import ASCII, GLYPHS

STYLES = {
    "completed": "green",
    "failed": "bold red",
    "stuck": "bold red",
    "retrying": "yellow",
    "paused": "bold magenta",
    "parked": "cyan",
    "waiting": "cyan",
    "running": "blue",
    "pending": "dim",
    "cancelled": "dim",
    "earlier": "dim",  # a failure that a later attempt has made good, or may yet
    "lost": "magenta",
    "succeeded": "green",
}
MARK_STYLES = {"█": "green", "▓": "red", "░": "dim", "·": "dim", "↯": "magenta", "▒": "blue"}
# Columns that a narrow terminal may cut, in this order, and to how many characters. Ids and numbers stay whole, and
# what is cut here is whole in `show`, in --json and off a terminal.
SHRINK = (
    *((name, 12) for name in ("WHY", "OUTCOME", "ERROR", "DETAIL", "REASON", "VALUE")),
    *((name, 8) for name in ("NEXT", "STEP", "WORKFLOW")),
)
NO_BREAK = "\u00a0"
FLEXIBLE = {name for name, _ in SHRINK}


class Screen:
    """One output stream.

    COLUMNS sets the width, of the timeline off a terminal too. NO_COLOR switches colours off and wins over FORCE_COLOR,
    which switches them on where the stream is no terminal.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream: IO[str] = stream if stream is not None else sys.stdout
        self.terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        forced = os.environ.get("FORCE_COLOR", "") not in ("", "0")
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self.colour = (self.terminal or forced) and not plain
        self.encoding = getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def width(self) -> int:
        """Characters a line: COLUMNS, the terminal's, or 100."""
        return shutil.get_terminal_size((100, 24)).columns if self.terminal or os.environ.get("COLUMNS") else 100

    def encodable(self, text: str) -> str:
        """`text` with what the stream can't encode replaced: glyphs by their ASCII twins, the rest by escapes."""
        text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
        try:
            text.encode(self.encoding)
            return text
        except (UnicodeEncodeError, LookupError):
            twin = text.translate(ASCII)
            return twin.encode("ascii", "backslashreplace").decode("ascii")

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line, never cut. Control characters in it are escaped: messages are other people's."""
        shown = self.encodable(text)
        self.stream.write((self._styled(shown, style) if style and self.colour and shown else shown) + "\n")

    def wrapped(self, label: str, text: str, style: str | None = None) -> None:
        """A labelled line. On a terminal too narrow for it the rest stands below its beginning; elsewhere it is one
        line. A no-break space keeps together what it joins."""
        import textwrap

        lines = [label + text]
        if self.terminal:
            lines = textwrap.wrap(
                label + text,
                max(self.width, 40),
                subsequent_indent=" " * len(label),
                break_long_words=False,
                break_on_hyphens=False,
            ) or [label]
        for line in lines:
            self.line(line.replace(NO_BREAK, " "), style)

    def commands(self, commands: Iterable[str]) -> None:
        """The commands that act, each kept whole."""
        self.wrapped("do     ", " · ".join(command.replace(" ", NO_BREAK) for command in commands), "dim")

    def raw(self, text: str) -> None:
        """Text for machines, as it is."""
        self.stream.write(text + "\n")

    def marked(self, label: str, text: str, style: str | None) -> None:
        """A line whose first words carry the colour."""
        if not self.colour or style is None:
            self.line(f"{label} {text}")
            return
        self.stream.write(self._styled(self.encodable(f"{label} {text}"), style) + "\n")

    def bar(self, text: str, *, failed: bool) -> None:
        """A row of a timeline. Of its failures only the one that ended the step is red, the others go grey."""
        if not self.colour:
            self.line(text)
            return
        last = text.rfind("▓") if failed else -1
        first_of_last = len(text[: last + 1].rstrip("▓")) if failed else len(text)
        for run in re.finditer(r"([█▓░·↯▒])\1*|[^█▓░·↯▒]+", text):
            style = MARK_STYLES.get(run.group()[0])
            if style == "red" and run.start() < first_of_last:
                style = "dim"
            shown = self.encodable(run.group())
            self.stream.write(self._styled(shown, style) if style else shown)
        self.stream.write("\n")

    def table(self, names: tuple[str, ...], rows: list[list[str]], states: list[str] | None = None) -> None:
        """Rows under headings: plain off a terminal, fitted and coloured on one.

        Args:
            states: The state of each row, for its colour.
        """
        if not self.terminal and not self.colour:
            for text in columns(names, rows):
                self.line(text)
            return
        self._rich_table(names, rows, states)

    def _rich_table(self, names: tuple[str, ...], rows: list[list[str]], states: list[str] | None) -> None:
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = [[self.encodable(" ".join(cell.split("\n"))) for cell in row] for row in rows]
        widths = [max([len(name), *(cell_len(row[i]) for row in shown)]) for i, name in enumerate(names)]
        total = sum(widths) + 2 * (len(names) - 1)
        width = self.width if self.terminal else max(total, 1)
        over = total - width
        for name, least in SHRINK:
            for i in (i for i, other in enumerate(names) if other == name and over > 0):
                given = min(over, max(0, widths[i] - max(least, len(name))))
                widths[i], over = widths[i] - given, over - given
        shown = [[_cut(cell, widths[i], self.encodable("…")) for i, cell in enumerate(row)] for row in shown]
        total = sum(widths) + 2 * (len(names) - 1)
        table = Table(box=None, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True)
        for i, name in enumerate(names):
            table.add_column(
                name.rjust(widths[i]) if name in RIGHT else name,
                no_wrap=True,
                overflow="ellipsis" if name in FLEXIBLE else "ignore",
                min_width=widths[i],
                max_width=widths[i],
                header_style="bold",
            )
        for row, state in zip(shown, states or [""] * len(rows), strict=True):
            style = STYLES.get(state, "")
            # rich does not justify what it may neither wrap nor cut
            cells = [
                Text(cell.rjust(width) if name in RIGHT else cell, style=style if name == "STATE" else "")
                for name, cell, width in zip(names, row, widths, strict=True)
            ]
            table.add_row(*cells)
        # Wider than the terminal when ids need it: the terminal wraps the line, where rich would cut the id.
        console = Console(
            file=self.stream,
            width=max(width, total + 2),
            force_terminal=True,
            no_color=not self.colour,
            color_system="auto" if self.colour and self.terminal else "standard" if self.colour else None,
            highlight=False,
            markup=False,
            legacy_windows=False,
        )
        with console.capture() as captured:
            console.print(table)
        for text in captured.get().splitlines():
            self.stream.write(self._replace_unencodable(text.rstrip()) + "\n")

    def _replace_unencodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
            return text
        except (UnicodeEncodeError, LookupError):
            return text.translate(ASCII).encode("ascii", "backslashreplace").decode("ascii")

    def _styled(self, text: str, style: str) -> str:
        from rich.style import Style

        return Style.parse(style).render(text)

    def clear(self) -> None:
        """Before a watched screen is drawn again."""
        if self.terminal:
            self.stream.write("\x1b[H\x1b[2J\x1b[3J" if os.environ.get("TERM") != "dumb" else "\n")
        else:
            self.stream.write("\n")

    def flush(self) -> None:
        self.stream.flush()


def _cut(cell: str, width: int, end: str) -> str:
    """rich's own ellipsis is one character, and three where the stream has no Unicode."""
    from rich.cells import cell_len, set_cell_size

    return cell if cell_len(cell) <= width else set_cell_size(cell, max(0, width - len(end))) + end


def glyph(state: str) -> str:
    return GLYPHS.get(state, "·")


def error_line(message: str) -> None:
    """One clear line on stderr."""
    screen = Screen(sys.stderr)
    screen.marked("error:", " ".join(message.split()), "bold red")
    screen.flush()


def note_line(message: str) -> None:
    """A remark on stderr: not a result, not an error."""
    screen = Screen(sys.stderr)
    screen.line(" ".join(message.split()), "dim")
    screen.flush()


def to_json(value: Any) -> str:
    """JSON for machines, the same whatever the stream: ASCII only, so that no encoding can spoil it."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=True, default=str)
