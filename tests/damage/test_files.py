"""Every file of a store damaged in every way, and every call that reads it asked: no answer is wrong without saying so.

`make test` takes a sample, `make test-all` every seventh bit and length and every block and file; each bit takes
hours: `python -m benchmarks.damage --step 1`. tests/unit/storage flips every bit of journals, leases and
storage.json.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.damage import damages
from benchmarks.damage.__main__ import content, places
from benchmarks.damage.harness import Answer, Harness, compare
from benchmarks.damage.ours import Ours


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(Ours(), tmp_path_factory.mktemp("damage") / "store")


def check(harness: Harness) -> None:
    report = harness.report
    wrong = {outcome: report.total(outcome) for outcome in ("SILENT", "crash", "hang", "unnamed")}
    assert not any(wrong.values()), "\n".join([str(wrong), *report.worst[:20]])


def test_a_damaged_byte_is_named_or_harms_nothing(harness: Harness) -> None:
    harness._thorough = 100
    harness.run(itertools.islice(content(harness, 1), 0, None, 2503))
    check(harness)
    assert harness.report.total("detected") > 20
    assert harness.report.total("prefix") > 0


def test_a_file_in_another_place_is_named_or_harms_nothing(harness: Harness) -> None:
    harness._thorough = 10
    harness.run(itertools.islice(places(harness, {}), 0, None, 149))
    check(harness)


@pytest.mark.slow
def test_every_seventh_bit_damaged_is_named_or_harms_nothing(harness: Harness) -> None:
    harness._thorough = 997
    harness.run(content(harness, 7))
    check(harness)


@pytest.mark.slow
def test_each_file_in_another_place_is_named_or_harms_nothing(harness: Harness, tmp_path: Path) -> None:
    harness._thorough = 3
    harness.run(places(harness, Ours().make(tmp_path / "elsewhere")[-1]))
    check(harness)


# The judge itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "lost_records", "outcome"),
    [
        (Answer({"a": (1, 2), "b": (1, 2)}), False, "harmless"),
        (Answer({"a": (1,), "b": (1, 2)}, torn=frozenset("a")), False, "prefix"),
        (Answer({"a": (1,), "b": (1, 2)}), True, "tail"),
        (Answer({"a": (1,), "b": (1, 2)}), False, "SILENT"),  # shorter, and nobody says so
        (Answer({"a": (1, 2), "b": (1,)}, torn=frozenset("b")), True, "SILENT"),  # of a run that had ended
        (Answer({"a": (2,), "b": (1, 2)}, torn=frozenset("a")), True, "SILENT"),  # no prefix
        (Answer({"a": (1, 2)}), True, "SILENT"),  # a run is gone
        (Answer({"a": (1, 2), "b": (1, 2), "c": ()}), True, "SILENT"),  # one more
    ],
)
def test_the_judge_lets_no_wrong_answer_pass(answer: Answer, lost_records: bool, outcome: str) -> None:
    right = Answer({"a": (1, 2), "b": (1, 2)}, unfinished=frozenset("a"))
    assert compare(right, answer, lost_records=lost_records) == outcome


def test_every_sort_of_damage_is_made() -> None:
    state = {"a/x": b"one\ntwo\n", "a/y": b"three\nfour\n"}
    history = [{"a/x": b"one\n"}, state]
    made = [
        *damages.flipped_bits(state, "a/x"),
        *damages.cuts(state, "a/x"),
        *damages.additions(state, "a/x"),
        *damages.moved_blocks(state, "a/x", ["a/y"]),
        *damages.removed(state),
        *damages.misplaced_files(state),
        *damages.stale_files(history),
        *damages.foreign_files(state, {"a/x": b"else"}),
        *damages.copies(state, {"a/x": ["a/z"]}),
    ]
    kinds = {damage.kind for damage in made}
    assert kinds == set(
        "bit cut added dropped repeated blanked swapped misdirected removed misplaced exchanged stale foreign "
        "copied renamed".split()
    )
    assert sum(damage.kind == "bit" for damage in made) == 64
    assert all(state.get(file) != content for damage in made for file, content in damage.changes.items())
