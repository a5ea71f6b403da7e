"""The SQL of the ready answers, over the views of `sql`. Pure text: one question, one query. Called by `answers`.

`{since}` stands for the instant from which on attempts, steps and runs count, `{limit}` for a number of rows and
`{node}` for a condition on the node.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Answer(NamedTuple):
    """title: the question. sql: the query; see the module for what it leaves open."""

    title: str
    sql: str


_TOOK: Final = "(epoch_us(ended_at) - epoch_us(started_at)) / 1e6"

ANSWERS: Final[dict[str, Answer]] = {
    "overview": Answer(
        "how runs ended, or stand, by workflow",
        """
        select workflow, status, count(*) as runs, sum(retries) as retries, sum(recoveries) as recoveries,
            round(median((epoch_us(finished_at) - epoch_us(created_at)) / 1e6), 3) as median_s,
            max(created_at) as newest
        from runs where created_at >= {since} group by all order by workflow, runs desc, status
        """,
    ),
    "failures": Answer(
        "how often each step fails, and of what",
        """
        with ended as (
            select step, kind, error_type, status from attempts
            where status in ('failed', 'succeeded') and started_at >= {since}
        ), totals as (select step, count(*) as attempts from ended group by step),
        final as (
            select step, error_type, count(*) as steps_failed from steps
            where status = 'failed' and scheduled_at >= {since} group by all
        )
        select step, kind, error_type, count(*) as failures, any_value(attempts) as attempts,
            round(count(*) / any_value(attempts), 4) as rate, coalesce(any_value(steps_failed), 0) as steps_failed
        from ended join totals using (step) left join final using (step, error_type)
        where status = 'failed' group by all order by failures desc, step, error_type
        """,
    ),
    "retries": Answer(
        "what failed attempts cost: the time they ran, and the time that was waited after them",
        f"""
        with ended as (
            select step, status, delay_s, {_TOOK} as took_s from attempts
            where ended_at is not null and started_at >= {{since}}
        )
        select step, count(*) as attempts, count(*) filter (status = 'failed') as failed,
            round(coalesce(sum(took_s) filter (status = 'failed'), 0), 3) as failed_s,
            round(coalesce(sum(delay_s), 0), 3) as waited_s,
            round(coalesce(sum(took_s) filter (status = 'failed'), 0) / nullif(sum(took_s), 0), 4) as wasted
        from ended group by step having failed > 0 order by failed_s + waited_s desc, step
        """,
    ),
    "slowest": Answer(
        "which steps take longest, waits and retries included",
        f"""
        select step, count(*) as steps, round(median({_TOOK}), 3) as median_s,
            round(quantile_cont({_TOOK}, 0.95), 3) as p95_s, round(max({_TOOK}), 3) as max_s,
            arg_max(run_id, {_TOOK}) as slowest_run
        from steps where ended_at is not null and started_at >= {{since}}
        group by step order by p95_s desc, step limit {{limit}}
        """,
    ),
    "recovery": Answer(
        "how long it took until what was lost went on: steps until their next attempt, runs until their next owner",
        """
        with steps_lost as (
            select 'step' as what, status, coalesce(cause, 'unknown') as cause, ended_at as lost_at,
                lead(started_at) over (partition by run_id, position order by epoch, dispatch, attempt) as again_at
            from attempts
        ), runs_lost as (
            select 'run' as what, type, data->>'cause' as cause, recorded_at as again_at,
                lag(recorded_at) over (partition by run_id order by seq) as lost_at
            from events
        ), gaps as (
            select what, cause, lost_at, again_at from steps_lost where status = 'lost'
            union all
            select what, 'run_actor_lost', lost_at, again_at from runs_lost
            where type = 'run_activated' and cause = 'recovery'
        ), timed as (select *, greatest(0, (epoch_us(again_at) - epoch_us(lost_at)) / 1e6) as took_s from gaps)
        select what, cause, count(*) as lost, count(took_s) as recovered, round(median(took_s), 3) as median_s,
            round(quantile_cont(took_s, 0.95), 3) as p95_s, round(max(took_s), 3) as max_s
        from timed where lost_at >= {since} group by all order by what, lost desc, cause
        """,
    ),
    "nodes": Answer(
        "which nodes fail: attempts that failed or were lost there",
        """
        select node, count(*) as attempts, count(*) filter (status = 'failed') as failed,
            count(*) filter (status = 'lost') as lost,
            round(count(*) filter (status in ('failed', 'lost')) / count(*), 4) as rate,
            mode(error_type) as most_frequent_error
        from attempts where node <> '' and started_at >= {since}
        group by node order by rate desc, attempts desc, node
        """,
    ),
    "breakers": Answer(
        "what circuit breakers saved: attempts that steps had left when their breaker refused them",
        """
        with policies as (
            select run_id, position, cast(data->'policy'->>'max_retries' as integer) as max_retries from events
            where type = 'step_scheduled'
        ), refused as (
            select breaker, run_id, greatest(1, coalesce(max_retries + 1 - (attempts - 1), 1)) as saved
            from steps join policies using (run_id, position)
            where why = 'refused' and breaker is not null and scheduled_at >= {since}
        )
        select breaker, count(*) as steps_refused, count(distinct run_id) as runs, sum(saved) as attempts_saved
        from refused group by breaker order by attempts_saved desc, breaker
        """,
    ),
    "died": Answer(
        "what was running when a node died",
        """
        with deaths as (
            select node, ended_at as died_at from attempts where status = 'lost' and cause = 'node_lost'
        ), lost as (
            select * from attempts a where status = 'lost' and node <> '' and ended_at >= {since} and ({node} or exists
                (select 1 from deaths d where d.node = a.node and abs(epoch(d.died_at) - epoch(a.ended_at)) < 300))
        )
        select l.node, l.ended_at as lost_at, l.run_id, l.step, l.attempt, l.cause,
            round((epoch_us(l.ended_at) - epoch_us(l.started_at)) / 1e6, 3) as had_run_s, s.status as step_now,
            r.status as run_now
        from lost l join steps s using (run_id, position) join runs r using (run_id)
        order by lost_at desc, l.run_id, l.position, l.attempt
        """,
    ),
}
