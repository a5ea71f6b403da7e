"""`make demo-record`: run a command on a terminal of fixed size, keep what it printed, and draw it.

    python docs/recording docs/demo --command 'pyworkflow-ray demo' --speed 6

writes docs/demo.cast (asciicast v2, the real times) and docs/demo.svg. `{dir}` in the command is a fresh directory,
which the recording shows under another name.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from cast import Recording, record
from svg import draw

SHOWN_DIR = "/tmp/demo"


def main() -> int:
    parser = argparse.ArgumentParser(description="Record a command and draw it as an animated SVG.")
    parser.add_argument("output", type=Path, help="where to write, without the suffix")
    parser.add_argument("--command", help="what to run; without it an existing .cast is drawn anew")
    parser.add_argument("--shown", help="the command as the first line shows it")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--rows", type=int, default=23)
    parser.add_argument("--speed", type=float, default=1.0, help="how many times as fast it is shown")
    given = parser.parse_args()
    cast, picture = given.output.with_suffix(".cast"), given.output.with_suffix(".svg")
    if given.command:
        with tempfile.TemporaryDirectory(prefix="recorded-") as folder:
            command = [part.replace("{dir}", f"{folder}/demo") for part in shlex.split(given.command)]
            shown = given.shown or given.command
            code, made = record(command, given.columns, given.rows, shown, {f"{folder}/demo": SHOWN_DIR})
        if code != 0:
            print(f"{given.command} ended with {code}: nothing is recorded", file=sys.stderr)
            return 1
        made.write(cast)
    picture.write_text(draw(Recording.read(cast), speed=given.speed), encoding="utf-8")
    print(f"{cast} {cast.stat().st_size // 1000} kB, {picture} {picture.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
