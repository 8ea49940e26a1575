"""The life of a job: the only place where a status changes.

`decide(state, event, now, …)` takes what is known and what happened, and answers what is
true from now on.  It reads no clock, draws no random number and does no I/O; whoever calls
it writes the answer down, whole, in the transaction that read the state.

    pending ──Intended──▶ processing ──Stored──▶ completed
       ▲                   │  submitting ─Started─▶ generating ─Generated─▶ storing
       │                   │  submitting ─OutcomeUnknown─▶ reconciling ─Started─▶ …
       └──── transient ────┤
         (attempts left)   ├──▶ failed      permanent, attempts used up, deadline
                           └──▶ cancelled   asked for, and the provider agrees

An attempt is one intended purchase.  It is written down as SENT *before* the provider is
called, so whatever dies afterwards leaves a trace.  A SENT attempt without a handle may have
been bought: it is reconciled, never sent again.  `Heard` may overtake the look that buys or
reconciles: then what that look has to say is old, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import assert_never

from app.domain.events import (
    CancelRequested,
    Event,
    Expired,
    GenerationCancelled,
    GenerationFailed,
    Generated,
    Heard,
    Intended,
    LookFailed,
    NotFound,
    OutcomeUnknown,
    OutputFailed,
    Progressed,
    Refused,
    Started,
    Stored,
    WentSilent,
)
from app.domain.generation import Failure, RefusalKind
from app.domain.policy import Policy, RetryPolicy
from app.domain.state import Attempt, AttemptState, JobState, Stage, Status

# Looks that may call what was heard an error of the provider's, before it is forgotten.
MOST_DOUBTS = 10


class IllegalEvent(Exception):
    """The event cannot happen in this state: a mistake in the caller, nothing is changed."""

    def __init__(self, state: JobState, event: Event) -> None:
        super().__init__(f"{type(event).__name__} in {state.status}/{state.stage}")


def decide(
    state: JobState, event: Event, now: datetime, policy: Policy, draw: float
) -> JobState:
    """Answer what is true after the event.

    A finished job never changes: every event leaves it as it is.  `draw` is a random number
    0…1 for jitter.  `version` grows by one exactly when something a caller can see changed.
    Raises `IllegalEvent` where the event cannot happen; nothing is decided then.
    """
    if state.is_terminal:
        return state
    after = _apply(_Case(state, now, policy, draw), event)
    if after.is_cancel_requested and after.status is Status.PENDING:
        after = _finish(after, Status.CANCELLED, now)
    is_visible = _visible(after) != _visible(state)
    return replace(after, version=state.version + 1) if is_visible else after


def overdue(state: JobState, now: datetime, policy: Policy) -> Event | None:
    """Give the event that ends a live job whose time was up long ago, or None.

    For whoever is about to look: looks that never come to an end (the worker dies of the
    job, the provider is away for good) must not go on for ever.
    """
    if state.status is Status.PENDING:
        return Expired() if now >= state.deadline_at else None
    if state.stage is Stage.STORING:
        sent_at = state.attempt.sent_at if state.attempt else state.created_at
        end = sent_at + policy.data_lifetime + policy.last_resort
        return LookFailed("given up") if now >= end else None
    return Expired() if now >= state.deadline_at + policy.last_resort else None


@dataclass(frozen=True, slots=True)
class _Case:
    """One decision's circumstances."""

    state: JobState
    now: datetime
    policy: Policy
    draw: float


def _apply(case: _Case, event: Event) -> JobState:
    if _is_overtaken(case.state, event):
        return replace(case.state, due_at=case.now)
    match event:
        case Intended():
            return _intend(case, event)
        case Started():
            return _start(case, event)
        case Heard():
            return _hear(case, event)
        case Refused():
            return _refuse(case, event)
        case OutcomeUnknown():
            return _lose_sight(case, event)
        case NotFound():
            return _miss(case, event)
        case Progressed():
            return _progress(case, event)
        case Generated():
            return _generate(case, event)
        case GenerationFailed():
            return _fail_generation(case, event)
        case GenerationCancelled():
            return _cancel_generation(case, event)
        case Stored():
            return _store(case, event)
        case OutputFailed():
            return _fail_output(case, event)
        case CancelRequested():
            return _request_cancel(case)
        case Expired():
            return _expire(case)
        case WentSilent():
            return _go_silent(case, event)
        case LookFailed():
            return _fail_look(case)
        case _:
            assert_never(event)


def _intend(case: _Case, event: Event) -> JobState:
    state, now = case.state, case.now
    if state.status is not Status.PENDING:
        raise IllegalEvent(state, event)
    ready = state.open_attempt
    number = ready.number if ready else state.attempts + 1
    return replace(
        state,
        status=Status.PROCESSING,
        stage=Stage.SUBMITTING,
        started_at=state.started_at or now,
        attempts=max(state.attempts, number),
        attempt=Attempt(number, AttemptState.SENT, sent_at=now),
        progress=None,
        has_news=False,  # left behind by workers of a version that knew no news
        look_failures=0,
        # Should the worker die right here, the next look finds a SENT attempt.
        due_at=now + case.policy.reconcile_at[0],
    )


def _start(case: _Case, event: Started) -> JobState:
    attempt = _require(case, event, Stage.SUBMITTING, Stage.RECONCILING)
    return _run(case, attempt, event.handle, event.usual_seconds)


def _hear(case: _Case, event: Heard) -> JobState:
    """Adopt a purchase of unknown fate, or one that was declared lost and is wanted still.

    Where the handle is known already there is nothing to decide: whoever heard sees to it
    that somebody looks.
    """
    state, attempt = case.state, case.state.attempt
    if attempt is None or event.number > attempt.number:
        return state
    is_latest = event.number == attempt.number
    is_awaited = attempt.state is AttemptState.SENT and is_latest
    # Nothing was bought since: the late arrival saves a purchase.
    is_wanted = state.status is Status.PENDING and attempt.state in (
        AttemptState.LOST,
        AttemptState.READY,
    )
    if not is_awaited and not is_wanted:
        return state
    running = _run(case, attempt, event.handle, usual_seconds=None)
    if not event.is_over:
        return running
    return replace(running, has_news=True, due_at=case.now)


def _run(
    case: _Case, attempt: Attempt, handle: str, usual_seconds: float | None
) -> JobState:
    """The attempt is bought and runs at the provider."""
    return replace(
        case.state,
        status=Status.PROCESSING,
        stage=Stage.GENERATING,
        attempt=replace(attempt, state=AttemptState.RUNNING, handle=handle),
        progress=None,
        look_failures=0,
        due_at=_next_watch(case, attempt, usual_seconds),
    )


def _refuse(case: _Case, event: Refused) -> JobState:
    attempt = _require(case, event, Stage.SUBMITTING)
    match event.kind:
        case RefusalKind.PERMANENT:
            closed = _close(case.state, attempt, AttemptState.REFUSED)
            return _finish(closed, Status.FAILED, case.now, event.failure)
        case RefusalKind.TRANSIENT:
            closed = _close(case.state, attempt, AttemptState.REFUSED)
            return _try_again(case, closed, event.failure, event.retry_after_seconds)
        case RefusalKind.UNREACHABLE | RefusalKind.THROTTLED | RefusalKind.ACCOUNT:
            # Certainly not bought, and not the job's fault: the same attempt goes again.
            failures = case.state.look_failures + 1
            floor = event.retry_after_seconds
            if event.kind is RefusalKind.ACCOUNT:
                floor = max(floor or 0.0, case.policy.account_pause.total_seconds())
            delay = case.policy.retry.delay(failures, case.draw, at_least=floor)
            return replace(
                case.state,
                status=Status.PENDING,
                stage=Stage.QUEUED,
                attempt=replace(attempt, state=AttemptState.READY),
                look_failures=failures,
                due_at=case.now + delay,
            )
        case _:
            assert_never(event.kind)


def _lose_sight(case: _Case, event: OutcomeUnknown) -> JobState:
    attempt = _require(case, event, Stage.SUBMITTING)
    # Whoever comes late (the worker died) asks at once.
    first = attempt.sent_at + case.policy.reconcile_at[0]
    return replace(
        case.state,
        stage=Stage.RECONCILING,
        look_failures=0,
        due_at=max(first, case.now),
    )


def _miss(case: _Case, event: NotFound) -> JobState:
    attempt = _require(case, event, Stage.RECONCILING)
    if case.now >= case.state.deadline_at:
        return _expire(case)
    due_at = _next_reconciliation(case, attempt)
    if due_at is not None:
        return replace(case.state, look_failures=0, due_at=due_at)
    lost = _close(case.state, attempt, AttemptState.LOST)
    failure = Failure(
        "outcome_lost", "The provider never confirmed the generation.", retryable=True
    )
    if case.now - attempt.sent_at > case.policy.data_lifetime:
        # By now the provider has wiped what would show it: buying again could be the
        # second purchase.
        return _finish(lost, Status.FAILED, case.now, failure)
    return _try_again(case, lost, failure)


def _progress(case: _Case, event: Progressed) -> JobState:
    state = case.state
    attempt = _require(case, event, Stage.GENERATING)
    progress = state.progress
    if event.progress is not None:
        # Whole percents: finer steps would be a new version with every look.
        share = round(min(max(event.progress, 0.0), 1.0), 2)
        progress = max(progress or 0.0, share)
    if event.is_contradicted and state.look_failures < MOST_DOUBTS:
        doubts = state.look_failures + 1
        return replace(
            state,
            progress=progress,
            has_news=True,
            look_failures=doubts,
            due_at=case.now + case.policy.doubted_look(doubts),
        )
    due_at = _next_watch(case, attempt, event.usual_seconds)
    return replace(state, progress=progress, look_failures=0, due_at=due_at)


def _generate(case: _Case, event: Generated) -> JobState:
    if case.state.stage is Stage.STORING:
        return case.state  # written down before, and the answer to that was lost
    attempt = _require(case, event, Stage.GENERATING)
    learned = case.now - timedelta(seconds=max(event.ago_seconds, 0.0))
    return replace(
        case.state,
        stage=Stage.STORING,
        attempt=replace(attempt, state=AttemptState.SUCCEEDED),
        progress=1.0,
        generated_at=max(learned, case.state.started_at or learned),
        has_news=False,
        look_failures=0,
        due_at=case.now,
    )


def _fail_generation(case: _Case, event: GenerationFailed) -> JobState:
    attempt = _require(case, event, Stage.GENERATING)
    closed = _close(case.state, attempt, AttemptState.FAILED)
    if event.is_transient:
        return _try_again(case, closed, event.failure)
    return _finish(closed, Status.FAILED, case.now, event.failure)


def _cancel_generation(case: _Case, event: GenerationCancelled) -> JobState:
    state, now = case.state, case.now
    attempt = _require(case, event, Stage.GENERATING)
    closed = _close(state, attempt, AttemptState.CANCELLED)
    if state.is_cancel_requested:
        return _finish(closed, Status.CANCELLED, now)
    if now >= state.deadline_at:
        return _finish(closed, Status.FAILED, now, _deadline_exceeded())
    if event.is_aborted:
        failure = Failure(
            "provider_aborted", "The provider never started the generation.", True
        )
        return _try_again(case, closed, failure)
    failure = Failure(
        "provider_cancelled", "The generation was cancelled at the provider.", True
    )
    return _finish(closed, Status.FAILED, now, failure)


def _store(case: _Case, event: Stored) -> JobState:
    if case.state.stage is not Stage.STORING:
        raise IllegalEvent(case.state, event)
    warned = replace(case.state, warnings=case.state.warnings + event.warnings)
    return _finish(warned, Status.COMPLETED, case.now)


def _fail_output(case: _Case, event: OutputFailed) -> JobState:
    if case.state.stage is not Stage.STORING:
        raise IllegalEvent(case.state, event)
    if event.is_final:
        return _finish(case.state, Status.FAILED, case.now, event.failure)
    return _fail_look(case)


def _request_cancel(case: _Case) -> JobState:
    state = case.state
    if state.stage is Stage.STORING:
        return state  # The picture exists and is paid for: completion has won.
    # A look in progress keeps its lease: taking it away would throw away what it learns.
    due_at = state.due_at if state.is_claimed else case.now
    if state.stage is Stage.RECONCILING:
        due_at = state.due_at
    return replace(state, is_cancel_requested=True, due_at=due_at)


def _expire(case: _Case) -> JobState:
    state = case.state
    if state.stage is Stage.STORING or case.now < state.deadline_at:
        raise IllegalEvent(state, Expired())
    state = _give_up(state)
    if state.is_cancel_requested:
        return _finish(state, Status.CANCELLED, case.now)
    return _finish(state, Status.FAILED, case.now, _deadline_exceeded())


def _fail_look(case: _Case) -> JobState:
    """Look again later; the deadline, or the provider's hour while storing, bounds it."""
    state, attempt = case.state, case.state.attempt
    if state.stage is Stage.STORING and attempt is not None:
        if case.now - attempt.sent_at > case.policy.data_lifetime:
            failure = Failure(
                "output_expired",
                "The files could not be fetched while the provider kept them.",
                retryable=True,
            )
            return _finish(state, Status.FAILED, case.now, failure)
    failures = state.look_failures + 1
    delay = RetryPolicy(base=2.0, cap=timedelta(seconds=60)).delay(failures, case.draw)
    return replace(
        state,
        look_failures=failures,
        due_at=case.now + max(delay, case.policy.shortest_look),
    )


def _go_silent(case: _Case, event: WentSilent) -> JobState:
    """Space looks out that end in silence, and give up in the end.

    Whoever dies of this job takes the looks at others along.
    """
    state = replace(case.state, silent_looks=event.times)
    if event.times <= case.policy.silent_looks_forgiven:
        return state
    if event.times >= case.policy.most_silent_looks:
        return _finish(_give_up(state), Status.FAILED, case.now, _poisonous())
    wait = RetryPolicy(base=2.0, cap=timedelta(seconds=60)).delay(
        event.times - case.policy.silent_looks_forgiven, case.draw
    )
    return replace(state, due_at=case.now + max(wait, case.policy.shortest_look))


# ------------------------------------------------------------------------------- pieces


def _require(case: _Case, event: Event, *stages: Stage) -> Attempt:
    """Give the open attempt; the event is illegal without one or in another stage."""
    attempt = case.state.open_attempt
    if attempt is None or case.state.stage not in stages:
        raise IllegalEvent(case.state, event)
    return attempt


def _is_overtaken(state: JobState, event: Event) -> bool:
    """Tell news of a purchase that was heard of meanwhile, and adopted."""
    if state.stage is not Stage.GENERATING or state.attempt is None:
        return False
    if isinstance(event, Started):
        return event.handle == state.attempt.handle
    return isinstance(event, Refused | OutcomeUnknown | NotFound)


def _next_watch(case: _Case, attempt: Attempt, usual_seconds: float | None) -> datetime:
    """Say when to look at a running attempt by itself; the deadline is not slept through."""
    state, now = case.state, case.now
    if state.is_cancel_requested:
        is_new = attempt.state is not AttemptState.RUNNING
        return now if is_new else now + case.policy.shortest_look
    look = now + case.policy.next_look(now - attempt.sent_at, usual_seconds)
    return min(look, max(state.deadline_at, now + case.policy.shortest_look))


def _next_reconciliation(case: _Case, attempt: Attempt) -> datetime | None:
    """Say when to ask the provider for the attempt next; None after the grace period."""
    moments = (attempt.sent_at + age for age in case.policy.reconcile_at)
    return next((moment for moment in moments if moment > case.now), None)


def _give_up(state: JobState) -> JobState:
    """Close the open attempt, if there is one, as what is known of it."""
    attempt = state.open_attempt
    if attempt is None:
        return state
    end = {
        AttemptState.READY: AttemptState.REFUSED,
        AttemptState.SENT: AttemptState.LOST,
        AttemptState.RUNNING: AttemptState.CANCELLED,
    }
    return _close(state, attempt, end[attempt.state])


def _close(state: JobState, attempt: Attempt, end: AttemptState) -> JobState:
    # What was heard was about this attempt; the next one has its own news.
    closed = replace(attempt, state=end)
    return replace(state, attempt=closed, progress=None, has_news=False)


def _try_again(
    case: _Case, state: JobState, failure: Failure, at_least: float | None = None
) -> JobState:
    """Go back to the queue for another attempt, or fail when they are used up."""
    if state.attempts > case.policy.retry.max_retries:
        return _finish(state, Status.FAILED, case.now, failure)
    delay = case.policy.retry.delay(state.attempts, case.draw, at_least=at_least)
    return replace(
        state,
        status=Status.PENDING,
        stage=Stage.QUEUED,
        look_failures=0,
        due_at=case.now + delay,
    )


def _finish(
    state: JobState, status: Status, now: datetime, failure: Failure | None = None
) -> JobState:
    attempt = state.attempt
    if attempt is not None and attempt.state is AttemptState.READY:
        attempt = replace(attempt, state=AttemptState.REFUSED)
    return replace(
        state,
        status=status,
        stage=None,
        due_at=None,
        attempt=attempt,
        progress=1.0 if status is Status.COMPLETED else state.progress,
        failure=failure,
        is_claimed=False,
        has_news=False,
        silent_looks=0,
        completed_at=now,
    )


def _deadline_exceeded() -> Failure:
    return Failure(
        "deadline_exceeded", "The generation did not finish in time.", retryable=True
    )


def _poisonous() -> Failure:
    return Failure(
        "poisonous",
        "Looking after the job ended the worker again and again.",
        retryable=True,
    )


def _visible(state: JobState) -> JobState:
    """Blank what only the scheduler cares about."""
    return replace(
        state,
        version=0,
        due_at=None,
        look_failures=0,
        silent_looks=0,
        is_claimed=False,
        has_news=False,
    )
