"""Ready answers to the questions that come up after something failed: each a query over all runs, live and compacted.

    from pyworkflow_ray import answers
    answers.failures(since="1d").df()

Each function returns a DuckDBPyRelation, as `pw.sql` does (`.fetchall() .df() .arrow() .pl()`). The command line has
the same: `pyworkflow-ray runs summary failures`. Their SQL is in `storage/answers.py`, to be copied and changed.
Times are in seconds. Starts no Ray.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from pyworkflow_ray.connection import open_storage
from pyworkflow_ray.durations import Duration
from pyworkflow_ray.errors import ConfigurationError
from pyworkflow_ray.runs import instant

if TYPE_CHECKING:
    import duckdb

__all__ = ["breakers", "died", "failures", "nodes", "overview", "recovery", "retries", "slowest"]

Since = dt.datetime | Duration | None


def overview(since: Since = None) -> duckdb.DuckDBPyRelation:
    """How runs ended, or stand, by workflow. Columns: workflow, status, runs, retries, recoveries, median_s, newest."""
    return _ask("overview", since)


def failures(since: Since = None) -> duckdb.DuckDBPyRelation:
    """How often each step fails, and of what.

    Columns: step, kind, error_type, failures (attempts), attempts (of the step in all), rate (failures / attempts),
    steps_failed (steps that this error ended for good).

    Args:
        since: Attempts begun since this aware datetime, or within this span before now; None: all. So below, too.
    """
    return _ask("failures", since)


def retries(since: Since = None) -> duckdb.DuckDBPyRelation:
    """What failed attempts cost.

    Columns: step, attempts, failed, failed_s (time in failed attempts), waited_s (delays after them), wasted (share of
    the time in attempts that failed ones took).
    """
    return _ask("retries", since)


def slowest(since: Since = None, limit: int = 20) -> duckdb.DuckDBPyRelation:
    """The steps that take longest from their first attempt to their end, waits and retries included.

    Columns: step, steps, median_s, p95_s, max_s, slowest_run.
    """
    return _ask("slowest", since, limit=limit)


def recovery(since: Since = None) -> duckdb.DuckDBPyRelation:
    """How long it took until what was lost went on.

    Columns: what ("step": until its next attempt began; "run": from its last event under the lost owner until the next
    one took it up), cause, lost, recovered, median_s, p95_s, max_s.
    """
    return _ask("recovery", since)


def nodes(since: Since = None) -> duckdb.DuckDBPyRelation:
    """Which nodes fail. Columns: node, attempts, failed, lost, rate, most_frequent_error."""
    return _ask("nodes", since)


def breakers(since: Since = None) -> duckdb.DuckDBPyRelation:
    """What circuit breakers saved.

    Columns: breaker, steps_refused, runs, attempts_saved: those that the steps had left when they were refused (one,
    where a step is retried for ever).
    """
    return _ask("breakers", since)


def died(node: str | None = None, since: Since = None) -> duckdb.DuckDBPyRelation:
    """What was running when a node died: attempts lost within five minutes of a loss of their node.

    Columns: node, lost_at, run_id, step, attempt, cause, had_run_s, step_now, run_now (what became of step and run).

    Args:
        node: Of this node whatever was lost on it.
    """
    return _ask("died", since, node=node)


def _ask(name: str, since: Since, *, limit: int = 20, node: str | None = None) -> duckdb.DuckDBPyRelation:
    from pyworkflow_ray.storage.sql import query

    return query(open_storage(), answer_sql(name, instant(since), limit=limit, node=node))


def answer_sql(name: str, since: float | None, *, limit: int = 20, node: str | None = None) -> str:
    """The query of an answer. since: UNIX time.

    Raises:
        ConfigurationError: there is no such answer, or a limit below 1.
    """
    from pyworkflow_ray.storage.answers import ANSWERS

    if name not in ANSWERS:
        raise ConfigurationError(f"there is no answer {name!r}: one of {', '.join(ANSWERS)}")
    if limit < 1:
        raise ConfigurationError(f"limit={limit}: give 1 or more")
    begin = f"make_timestamptz({round((since or 0.0) * 1_000_000)})"
    at = "false" if node is None else "a.node = '" + node.replace("'", "''") + "'"
    sql = ANSWERS[name].sql.format(since=begin, limit=int(limit), node=at)
    if node is not None and name == "died":
        sql = sql.replace("from attempts a where", f"from attempts a where {at} and", 1)
    return sql
