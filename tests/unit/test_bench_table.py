"""The table of all benchmarks: each figure beside its aim, whatever way it missed or met it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import measure
from benchmarks.table import Row, markdown, number, rows_of

GROWTH = {
    "growth": {
        "load": {"8": {"runs_per_s": 40.0, "p50_s": 0.2, "p99_s": 0.31}},
        "steps": {"steps": 10_000, "first_s": 0.002, "last_s": 0.0024, "ratio": 1.2},
        "nodes": {
            "1": {"steps_per_s": 15.0, "efficiency": 1.0},
            "4": {"steps_per_s": 54.0, "efficiency": 0.9},
        },
    }
}


def test_a_figure_is_held_against_its_aim_in_its_own_direction() -> None:
    by_name = {row.what: row for row in rows_of(GROWTH)}
    assert by_name["step 10,000 against step 300"].met is False
    assert by_name["4 nodes against 4 times one"].met is True
    assert by_name["8 runs in flight, latency p99"].met is None
    assert "1 nodes against 1 times one" not in by_name  # it would be compared with itself


def test_the_aim_itself_meets_the_aim() -> None:
    assert Row("p", "w", 0.9, "x", ">=", 0.9).met is True
    assert Row("p", "w", 2.0, "s", "<=", 2.0).met is True


def test_what_was_missed_is_said_in_the_table() -> None:
    steps = next(line for line in markdown(rows_of(GROWTH)).splitlines() if "step 10,000" in line)
    columns = [column.strip() for column in steps.strip("|").split("|")]
    assert columns == [
        "growth",
        "step 10,000 against step 300",
        "1.2 x",
        "2,000 µs at the beginning",
        "≤ 1.1 x",
        "**missed**",
    ]


def test_a_part_that_was_not_measured_has_no_rows() -> None:
    assert rows_of({}) == []
    assert {row.part for row in rows_of(GROWTH)} == {"growth"}


def test_numbers_keep_three_digits() -> None:
    assert [number(value) for value in (0.01234, 1.2345, 99.9, 1234.5)] == ["0.0123", "1.23", "99.9", "1,234"]


def test_a_benchmark_that_fails_leaves_no_figures_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    assert measure(["none"], tmp_path, quick=True) == ["none"]  # there is no such benchmark
    assert not (tmp_path / "none.json").exists()
