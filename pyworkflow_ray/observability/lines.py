"""The three lines: verdict, why, next; the row of a list; and when a run is stuck.

Pure. Called by view with a folded `Story`. What the log cannot know (what the body does with a step's failure) is not
claimed: it says that the step fails, not what follows from it.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.observability import model as m
from pyworkflow_ray.observability.batches import MapTrack
from pyworkflow_ray.observability.steps import Track
from pyworkflow_ray.observability.story import Story
from pyworkflow_ray.observability.words import ago, clock, collapse, error_view, instant, one_line, plural, when

LATE_S = 30.0  # what is due and has not happened so long after is late: nobody is looking after the run
QUIET_S = 600.0  # an attempt without a timeout that says nothing for so long may be stuck

PAUSED = {
    "nondeterminism": "the code no longer does what the history says",
    "event_limit": "too many events",
    "max_recoveries": "lost too often",
    "environment": "its code environment is gone",
    "code": "its code could not be loaded",
    "user": "by a person",
    "step_exhausted": "a step used up its retries",
}


@dataclass
class Words:
    verdict: str
    row: m.RowView
    why: str | None = None
    next: str | None = None
    next_at: float | None = None
    commands: list[str] = field(default_factory=list)


def compose(story: Story) -> Words:
    """All the words about a run."""
    words = {
        "completed": _completed,
        "failed": _failed,
        "cancelled": _cancelled,
        "paused": _paused,
        "pending": _pending,
        "parked": _parked,
        "retrying": _retrying,
        "stuck": _stuck,
        "waiting": _waiting,
        "running": _running,
    }[story.state](story)
    words.commands += _commands(story)
    if story.cancel is not None and story.ended_at is None:
        words.verdict += ", being cancelled"
    return words


def why_stuck(story: Story) -> str | None:
    """Why the run is stuck, None when it is not: something is late, or nobody holds the run."""
    if story.status not in ("pending", "running", "parked"):
        return None
    now = story.now
    if story.owner_alive is False and story.status in ("pending", "running"):
        return "no living process holds the run"
    if story.status == "pending":
        late = now - story.created.at
        return f"created {ago(late)} and taken up by nobody" if late > LATE_S else None
    if story.status == "parked":
        due = story.parked.due_at if story.parked else now
        return f"was due {ago(now - due)} and nobody woke it" if now - due > LATE_S else None
    running = [(t, a) for t in story.open_steps if (a := t.running)]
    for track, attempt in running:
        ran = now - (attempt.started_at if attempt.started_at is not None else story.last_at)
        limit = track.scheduled.policy.timeout_s
        if isinstance(track, MapTrack):  # each ended chunk is a word; a chunk may take its items' timeouts together
            ran, limit = now - track.last_at, track.quiet_s
        if ran > (QUIET_S if limit is None else limit + LATE_S):
            bound = f"its timeout is {format_duration(limit)}" if limit is not None else "it has no timeout"
            return f"{track.name}, attempt {attempt.attempt}, runs for {format_duration(ran)} without a word; {bound}"
    if running:
        return None
    for track in story.open_steps:
        if track.next_at is not None and now - track.next_at > LATE_S:
            return f"{track.name}: an attempt was due {ago(now - track.next_at)} and has not begun"
    timer = story.next_timer
    if timer is not None and now - timer.due_at > LATE_S:
        return f"a timer was due {ago(now - timer.due_at)} and has not fired"
    if not story.open_steps and not story.timers and now - story.last_at > LATE_S:
        return f"no event for {format_duration(now - story.last_at)}, and nothing that it waits for"
    return None


# One function a state ---------------------------------------------------------------------------------------------


def _completed(story: Story) -> Words:
    counts = _counts(story)
    verdict = f"completed ({', '.join(counts)})" if counts else "completed"
    took = format_duration((story.ended_at or story.now) - story.created.at)
    why = f"{plural(len(story.steps), 'step')} in {took}" if story.steps else f"in {took}"
    failed = [t for t in story.steps.values() if t.state == "failed"]
    if failed:
        why += ", " + ", ".join(f"{t.name} failed ({t.error.type if t.error else t.why})" for t in failed[:3])
        why += " and was dealt with" if len(failed) == 1 else " and were dealt with"
    return Words(verdict, m.RowView(state="completed", why=", ".join(counts)), why)


def _failed(story: Story) -> Words:
    assert story.failed is not None
    track, error = story.subject, error_view(story.failed.error)
    place = f" in {track.name}" if track else " in the workflow's own code"
    counts = _counts(story)
    verdict = f"failed{place}" + (f" ({', '.join(counts)})" if counts else "")
    why = _error_line(error, track)
    if track and track.why and track.why not in ("exhausted",):
        why += f"   {_WHY_NO_RETRY.get(track.why, track.why)}"
    elif track and track.why == "exhausted" and track.tries > 1:
        why += f"   all {track.tries} attempts used"
    words = Words(verdict, _row(story, "failed", track, error.line, "–"), why)
    run = story.created.run_id
    words.next = f"nothing by itself; pyworkflow-ray runs resume {run} goes on from the failed step"
    undone = any(step.scheduled.compensates for step in story.steps.values())
    if story.failed.position is None:  # no step to go on from: resume refuses it
        words.next = f"nothing by itself; correct the code, then pyworkflow-ray runs rerun {run} begins anew"
    if undone:
        words.next = f"nothing by itself: what it did is undone; pyworkflow-ray runs rerun {run} begins anew"
    words.commands.append(f"runs {'rerun' if undone or story.failed.position is None else 'resume'} {run}")
    return words


_WHY_NO_RETRY = {
    "permanent": "permanent: not retried",
    "no retry": "no retries asked for",
    "lost": "lost, and may not run again",
    "refused": "refused by its breaker",
    "deadline": "out of time",
    "code": "its code could not be loaded",
}


def _cancelled(story: Story) -> Words:
    assert story.cancelled is not None
    reason = story.cancelled.reason or (story.cancel.reason if story.cancel else None)
    why = one_line(reason) if reason else "by a person, no reason given"
    if story.cancelled.error is not None:
        why += f"; while it was cancelled: {error_view(story.cancelled.error).line}"
    at = story.cancelled.at
    return Words(
        f"cancelled {ago(story.now - at)}", m.RowView(state="cancelled", why=why), why, "nothing: the run has ended"
    )


def _paused(story: Story) -> Words:
    assert story.paused is not None
    run = story.created.run_id
    reason = PAUSED.get(story.paused.reason, story.paused.reason)
    words = Words(f"paused: {reason}", _row(story, "paused", story.subject, reason, "resume"))
    words.why = one_line(story.paused.message)
    words.next = f"nothing by itself; then pyworkflow-ray runs resume {run}"
    words.commands.append(f"runs resume {run}")
    return words


def _pending(story: Story) -> Words:
    age = ago(story.now - story.created.at)
    return Words(
        f"pending, created {age}",
        m.RowView(state="pending", why="not taken up yet", next="starts"),
        "the run is durable and waits for a run actor",
        "it starts as soon as a run actor is free",
    )


def _parked(story: Story) -> Words:
    assert story.parked is not None
    due = story.parked.due_at
    cause = "waits" if story.open_steps else "sleeps"
    track = story.subject
    words = Words(
        f"parked until {clock(instant(due), instant(story.now), story.tz, zone=True)}",
        _row(story, "parked", track, cause, f"wakes {_in(due - story.now)}"),
    )
    words.why = f"{cause}; it holds no worker and no actor meanwhile"
    if track is not None:
        words.why = f"{track.name} waits; the run holds no worker and no actor meanwhile"
    words.next, words.next_at = f"wakes {_when(due, story)}", due
    return _unowned(words, story)


def _retrying(story: Story) -> Words:
    track = story.subject
    assert track is not None
    last = track.last_failed
    assert last is not None
    assert last.error is not None
    total = "" if track.max_tries is None else f" of {track.max_tries}"
    number = sum(a.status != "lost" for a in track.fresh[: track.fresh.index(last) + 1])
    failed_ago = ago(story.now - last.ended_at) if last.ended_at is not None else ""
    verdict = f"retrying  {track.name}, attempt {number}{total} failed {failed_ago}".rstrip()
    error = error_view(last.error)
    count = f"{track.tries}/{track.max_tries}" if track.max_tries is not None else f"{track.tries}/∞"
    due, running = track.next_at, track.running
    words = Words(verdict, _row(story, f"retrying {count}", track, error.line, ""), _error_line(error, track))
    upcoming = number + 1
    if running is not None and running.started_at is not None:
        words.next = f"attempt {upcoming} runs since {format_duration(max(0.0, story.now - running.started_at))}"
        short = f"attempt {upcoming} runs"
    elif due is not None and due > story.now:
        words.next, words.next_at = f"attempt {upcoming} {_when(due, story)}", due
        short = f"attempt {upcoming} {_in(due - story.now)}"
        if last.delay_reason and not track.held_until:
            words.next += f" [{_reason(last.delay_s, last.delay_reason)}]"
    else:
        words.next = f"attempt {upcoming} as soon as a worker is free"
        short = f"attempt {upcoming} queued"
    words.next += _how_it_ends(story, track, upcoming, due if due is not None else story.now)
    words.row = words.row.model_copy(update={"next": short})
    if track.scheduled.breaker and track.held_until:  # what the attempt saw is older than the refusal
        if running is None and due is not None and due > story.now:
            words.next += f"; breaker {track.scheduled.breaker} is open until then"
    elif track.scheduled.breaker and last.breaker:
        words.next += f"; breaker {track.scheduled.breaker}: {last.breaker}"
    return _unowned(words, story)


def _unowned(words: Words, story: Story) -> Words:
    """A run that waits by itself, and whose owner is gone, is woken by nobody until it is taken up."""
    if story.owner_alive is False:
        words.next = f"its owner is gone: pyworkflow-ray recover takes it up; {words.next}"
        words.row = words.row.model_copy(update={"next": "recover"})
        words.commands.append("recover")
    return words


def _how_it_ends(story: Story, track: Track, upcoming: int, due: float) -> str:
    """The line's end: how many attempts are left and what then. Estimated without jitter, hence "about"."""
    policy, total = track.scheduled.policy, track.max_tries
    if total is None:
        return ", then again for ever"
    if upcoming >= total:
        return f", the last one; if it fails, {track.name} fails"
    cap = policy.max_retry_delay_s
    if cap is None:
        cap = 3600.0 if policy.retry_backoff > 1 else float("inf")
    following = due + min(cap, policy.retry_delay_s * policy.retry_backoff ** min(upcoming - 1, 64))
    left = total - upcoming
    if left == 1:
        about = clock(instant(following), instant(story.now), story.tz)
        return f", attempt {total} about {about}, then {track.name} fails"
    return f", {left} more after it, then {track.name} fails"


def _stuck(story: Story) -> Words:
    assert story.stuck is not None
    run = story.created.run_id
    gone = story.owner_alive is False
    quiet = f"no event for {format_duration(max(0.0, story.now - story.last_at))}"
    words = Words(f"stuck, {'its owner is gone' if gone else quiet}", m.RowView(state="stuck"))
    words.why = f"{story.stuck}; {quiet}" if gone else story.stuck
    words.row = _row(story, "stuck", story.subject, story.stuck, "recover")
    words.next = "nothing by itself while its owner is away; pyworkflow-ray recover takes it up"
    if story.owner_alive or (any(t.running for t in story.open_steps) and story.owner_alive is None):
        words.next = f"the attempt may still end; pyworkflow-ray runs cancel {run} stops it"
        words.row = words.row.model_copy(update={"next": "cancel"})
    if story.owner_alive is not True:
        words.commands.append("recover")
    return words


def _waiting(story: Story) -> Words:
    track = story.subject
    if track is None:
        timer = story.next_timer
        assert timer is not None
        words = Words("waiting: the workflow sleeps", m.RowView(state="waiting", why="sleeps"))
        words.why, words.next, words.next_at = (
            "a timer of the workflow",
            f"goes on {_when(timer.due_at, story)}",
            timer.due_at,
        )
        words.row = words.row.model_copy(update={"next": f"wakes {_in(timer.due_at - story.now)}"})
        return words
    since = format_duration(max(0.0, story.now - track.queued_since))
    breaker = track.scheduled.breaker
    if track.state == "waiting" and breaker:
        words = Words(
            f"waiting: {track.name} waits on breaker {breaker}", _row(story, "waiting", track, f"breaker {breaker}", "")
        )
        words.why = f"breaker {breaker} is open; the step spends no attempt and no worker meanwhile"
    else:
        words = Words(f"waiting: {track.name} is queued for a worker", _row(story, "waiting", track, "queued", ""))
        words.why = f"no worker was free for {since}"
        if track.lost_count:
            words.why = f"its worker was lost ({_lost_cause(track)}); queued for another since {since}"
    words.next = f"{track.name} starts as soon as a worker is free"
    if track.next_at is not None and track.next_at > story.now:
        words.next, words.next_at = f"{track.name} starts {_when(track.next_at, story)}", track.next_at
    words.row = words.row.model_copy(
        update={
            "next": "starts "
            + (_in(track.next_at - story.now) if words.next_at and track.next_at else "when a worker is free")
        }
    )
    return words


def _running(story: Story) -> Words:
    open_steps = [t for t in story.open_steps if t.running]
    if not open_steps:
        return Words(
            "running",
            m.RowView(state="running", why="its own code"),
            "the workflow's own code runs",
            "the code's next step",
        )
    track = open_steps[0]
    attempt = track.running
    assert attempt is not None
    since = attempt.started_at if attempt.started_at is not None else story.last_at
    many = f" and {plural(len(open_steps) - 1, 'other step')}" if len(open_steps) > 1 else ""
    ran = format_duration(max(0.0, story.now - since))
    words = Words(f"running {track.name}{many}", _row(story, "running", track, f"since {ran}", ""))
    words.why = f"attempt {attempt.attempt} of {track.name} runs since {ran}"
    if isinstance(track, MapTrack):
        words.why = f"{track.name}: {track.view(story.now).outcome}, since {ran}"
    if track.lost_count:
        words.why += f", after its worker was lost ({_lost_cause(track)})"
    limit = track.scheduled.policy.timeout_s
    words.next = "its outcome"
    if limit is not None:
        words.next_at = since + limit
        words.next = f"its outcome, or its timeout {_when(words.next_at, story)}"
    return words


# Parts ------------------------------------------------------------------------------------------------------------


def _row(story: Story, state: str, track: Track | None, why: str, next_: str) -> m.RowView:
    return m.RowView(state=state, step=track.name if track else None, why=why, next=next_)


def _counts(story: Story) -> list[str]:
    counts = []
    if story.retries:
        counts.append(plural(story.retries, "retry", "retries"))
    if story.recoveries:
        counts.append(plural(story.recoveries, "recovery", "recoveries"))
    return counts


def _error_line(error: m.ErrorView, track: Track | None) -> str:
    """Kind, type, message on one line, how often, and the place. Other errors before it are named by the first."""
    text = f"{error.kind} · {error.line}"
    if track is not None:
        errors = collapse([error_view(a.error) for a in track.fresh if a.error is not None])
        same = next((e.count for e in errors if (e.type, e.message) == (error.type, error.message)), 1)
        if same > 1:
            text += f"   (same error {same}×)"
        others = [e for e in errors if (e.type, e.message) != (error.type, error.message)]
        if others:
            text += f"   (first: {others[0].line})" if others[0] is errors[0] else f"   (also: {others[0].line})"
    return text + (f"   {error.where}" if error.where else "")


def _reason(delay_s: float | None, reason: str) -> str:
    return f"{reason} {format_duration(delay_s)}" if delay_s is not None else reason


def _lost_cause(track: Track) -> str:
    causes = [a.cause for a in track.attempts if a.status == "lost" and a.cause]
    return causes[-1].replace("_", " ") if causes else "cause unknown"


def _in(seconds: float) -> str:
    return f"in {format_duration(seconds)}" if seconds > 0 else "now"


def _when(at: float, story: Story) -> str:
    return when(instant(at), instant(story.now), story.tz)


def _commands(story: Story) -> list[str]:
    run = story.created.run_id
    commands = [f"runs timeline {run}"]
    track = story.subject
    commands.append(f"runs events {run}" + (f" --step {track.scheduled.number}" if track else ""))
    if story.ended_at is None:
        commands.append(f"runs cancel {run}")
    return commands


def started_line(view: m.RunView, tz: dt.tzinfo) -> str:
    """ "started 21:03:40 UTC, 7m ago"."""
    age = (view.now - view.created_at).total_seconds()
    return f"started {clock(view.created_at, view.now, tz, zone=True)}, {ago(age)}"
