"""docs/tutorial.md, as a reader would follow it: its files, the tests it shows, and each command with its output."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = {
    block.splitlines()[0].removeprefix("# "): block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
}
# Command -> what it prints.
COMMANDS = [
    (command, output)
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M)
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    assert FILES.keys() == {"shop.py", "test_shop.py"}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    return tmp_path


def words(command: str) -> list[str]:
    program, *rest = shlex.split(command.removesuffix(" &"))
    return [sys.executable, *rest] if program == "python" else [sys.executable, "-m", "pyworkflow_ray", *rest]


def in_shop(shop: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(command), cwd=shop, env=environment(shop), capture_output=True, text=True, check=False)


def environment(shop: Path) -> dict[str, str]:
    settings = {"PYWORKFLOW_STORAGE": str(shop / "storage"), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    return {**os.environ, **settings}


def plain(output: str) -> list[str]:
    """Its lines without what differs from run to run: times, the width they take, and how often an owner was lost."""
    varying = r"started .*|\b[\d.]+(ms|s|m|h)\b|(?<=\d )recover(y|ies)|\d(?= recover)"
    lines = [re.sub(varying, "", line) for line in output.splitlines()]
    return [" ".join(line.split()) for line in lines]


def test_its_tests_pass_and_doctor_finds_nothing(shop: Path) -> None:
    done = in_shop(shop, "python -m pytest -q")
    assert "\n3 passed" in done.stdout, done.stdout + done.stderr
    from pyworkflow_ray.cli.mistakes import find_in_files

    assert find_in_files([shop / "shop.py"], shop) == []


@pytest.mark.ray
@pytest.mark.slow
def test_every_command_prints_what_the_page_says(shop: Path) -> None:
    assert len(COMMANDS) > 6
    for (command, output), (following, _) in itertools.zip_longest(COMMANDS, COMMANDS[1:], fillvalue=("", "")):
        if following == "kill -9 $!":
            killed_while_it_sleeps(shop, command)
        elif command != "kill -9 $!" and "pytest" not in command:
            done = in_shop(shop, command)
            assert done.returncode == 0, done.stderr
            assert plain(done.stdout) == plain(output) or not output, done.stdout


def killed_while_it_sleeps(shop: Path, command: str) -> None:
    driver = subprocess.Popen(words(command), cwd=shop, env=environment(shop), stderr=subprocess.DEVNULL)
    family = psutil.Process(driver.pid)
    try:
        while not sleeping(shop):
            assert driver.poll() is None
        below = family.children(recursive=True)
    finally:
        driver.kill()
        driver.communicate()
    for process in below:  # Ray's own end themselves within a minute of their driver
        if process.is_running():
            process.kill()


def sleeping(shop: Path) -> bool:
    listed = in_shop(shop, "pyworkflow-ray runs list --limit 1 --json").stdout
    return [one["status"] for one in json.loads(listed or "[]")] == ["parked"]
