"""What a command prints on a terminal, and when: recorded from a pty, kept as asciicast v2.

Faults: the command is not there (OSError); what it printed names this machine, its user or a directory (ValueError, and
nothing is written).
"""

from __future__ import annotations

import codecs
import fcntl
import getpass
import json
import os
import pty
import re
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

JOINED_S = 0.02  # what comes closer together is one event


@dataclass(frozen=True)
class Recording:
    """A terminal's size, the command as shown, and what was printed: (seconds since the beginning, text)."""

    columns: int
    rows: int
    command: str
    events: tuple[tuple[float, str], ...]

    def write(self, path: Path) -> None:
        header = {"version": 2, "width": self.columns, "height": self.rows, "command": self.command}
        lines = [header, *([round(at, 3), "o", text] for at, text in self.events)]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Recording:
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        events = tuple((at, text) for at, kind, text in lines if kind == "o")
        return cls(header["width"], header["height"], header["command"], events)


def record(
    command: Sequence[str], columns: int, rows: int, shown: str, names: Mapping[str, str] | None = None
) -> tuple[int, Recording]:
    """Run a command on a terminal of `columns` by `rows`; its exit code, and what it printed.

    Args:
        command: Program and arguments.
        columns, rows: Size of the terminal, told to the command by the terminal itself.
        shown: The command as the recording names it.
        names: Text -> what stands in its place in the recording, for paths of this machine.

    Raises:
        OSError: the command can't be started.
        ValueError: the recording would name this machine, its user or the user's home.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    try:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    events = list(_read(ours))
    code = process.wait()
    for text, instead in (names or {}).items():
        events = [(at, printed.replace(text, instead)) for at, printed in events]
    made = Recording(columns, rows, shown, tuple(events))
    _check(made)
    return code, made


def _read(terminal: int) -> list[tuple[float, str]]:
    """Until the last process has closed the terminal. Pieces printed together are one, lest a path is cut in two."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    began = time.monotonic()
    events: list[tuple[float, str]] = []
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says EIO where others say end of file
            data = b""
        at = time.monotonic() - began
        text = decoder.decode(data, final=not data)
        if text:
            if events and at - events[-1][0] < JOINED_S:
                events[-1] = (events[-1][0], events[-1][1] + text)
            else:
                events.append((at, text))
        if not data:
            os.close(terminal)
            return events


def _check(made: Recording) -> None:
    printed = "".join(text for _, text in made.events)
    home = os.path.expanduser("~")
    for secret in (socket.gethostname(), home if len(home) > 1 else "", os.getcwd(), f"{getpass.getuser()}@"):
        if len(secret) > 1 and re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", printed):
            raise ValueError(f"the recording names {secret!r}, which is of this machine")
