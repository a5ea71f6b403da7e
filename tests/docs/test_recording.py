"""`make demo-record`: a real command is recorded as it printed, drawn as one SVG, and the README's is such a one."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "recording"))
from cast import Recording, record  # noqa: E402
from svg import LAST_S, draw, said, screens  # noqa: E402

del sys.path[0]

# A terminal program in small: it asks for the terminal's size, draws a bar over itself, colours, and ends with a table.
PROGRAM = """
import os, sys
size = os.get_terminal_size()
print(f"{size.columns} x {size.lines} {sys.stdout.isatty()}")
for done in (1, 2, 3):
    sys.stderr.write(f"\\r{'#' * done}")
    sys.stderr.flush()
sys.stderr.write("\\r\\x1b[2K")
print("\\x1b[1;32mproof\\x1b[0m in FOLDER, \\u2713")
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = str(tmp_path_factory.mktemp("machine"))
    command = [sys.executable, "-c", PROGRAM.replace("FOLDER", folder)]
    code, made = record(command, 50, 6, "proof", {folder: "/tmp/shown"})
    assert code == 0
    return made


def text_of(made: Recording) -> list[str]:
    return [said(frame) for _, frame in screens(made, 1)]


def test_a_command_sees_a_terminal_of_the_size_asked_for(recorded: Recording) -> None:
    assert "50 x 6 True" in text_of(recorded)[-1]


def test_what_was_printed_is_there_with_other_names_and_what_was_drawn_over_is_not(recorded: Recording) -> None:
    assert "###" in "".join(text for _, text in recorded.events)
    assert text_of(recorded)[0] == "$ proof"
    assert text_of(recorded)[-1] == "$ proof\n50 x 6 True\nproof in /tmp/shown, ✓"
    assert [at for at, _ in recorded.events] == sorted(at for at, _ in recorded.events)


def test_every_state_of_the_screen_is_a_frame_at_its_time_and_short_ones_are_passed_over() -> None:
    made = Recording(20, 4, "bar", ((0.0, "#"), (1.0, "\r##"), (1.01, "\r###"), (3.0, "\r\x1b[2Kdone\r\n")))
    frames = [(at, said(frame).removeprefix("$ bar")) for at, frame in screens(made, 1)]
    assert frames == [
        (0.0, ""),
        (pytest.approx(0.2), "\n#"),
        (pytest.approx(1.2), "\n###"),
        (pytest.approx(3.2), "\ndone"),
    ]
    fast = [at for at, _ in screens(made, 2)]
    assert fast == [0.0, pytest.approx(0.2), pytest.approx(0.6), pytest.approx(1.6)]


def test_the_picture_is_whole_of_a_fixed_size_and_shows_its_end_where_nothing_moves(recorded: Recording) -> None:
    picture = draw(recorded)
    root = ElementTree.fromstring(picture)
    assert root.attrib["width"] == "448"
    assert root.attrib["height"] == "156"
    frames = len(text_of(recorded))
    assert f"#s{{transform:translateX(-{448 * (frames - 1)}px);" in picture
    assert "prefers-reduced-motion:reduce" in picture
    assert 'fill="#56d364" class="b">proof</text>' in picture
    assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)", picture)


def test_what_was_written_is_read_and_drawn_alike(recorded: Recording, tmp_path: Path) -> None:
    recorded.write(tmp_path / "one.cast")
    again = Recording.read(tmp_path / "one.cast")
    assert draw(again, 3) == draw(again, 3)
    assert text_of(again) == text_of(recorded)


@pytest.mark.parametrize("secret", [socket.gethostname(), os.getcwd()])
def test_a_recording_that_names_the_machine_is_refused(secret: str) -> None:
    with pytest.raises(ValueError, match="of this machine"):
        record([sys.executable, "-c", f"print({secret!r})"], 80, 5, "leak")


def test_the_exit_code_is_the_commands() -> None:
    code, made = record([sys.executable, "-c", "print('no'); raise SystemExit(3)"], 80, 5, "fails")
    assert (code, text_of(made)[-1]) == (3, "$ fails\nno")


def test_the_readmes_picture_is_drawn_from_its_recording_of_a_whole_demo() -> None:
    made = Recording.read(ROOT / "docs" / "demo.cast")
    [speed] = re.findall(r"^demo-record:.*(?:\n\t.*)*--speed (\d+)", (ROOT / "Makefile").read_text("utf-8"), re.M)
    picture = (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8")
    assert picture == draw(made, float(speed)), "make demo-record, or draw docs/demo.cast anew"
    assert len(picture) < 500_000
    last_at, last = list(screens(made, float(speed)))[-1]
    assert last_at + LAST_S < 45
    assert "charged twice: 0, lost: 0, charged though rejected: 0" in said(last)
    printed = "".join(text for _, text in made.events)
    for role in ("run actor", "step worker", "controller"):
        assert f"SIGKILL {role} " in printed
    assert not re.search(r"/work|/home/|/root|/Users/", printed)
    assert "docs/demo.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
