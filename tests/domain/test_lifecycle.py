import math
from dataclasses import replace
from datetime import timedelta

import pytest

from app.domain.events import (
    CancelRequested,
    GenerationCancelled,
    GenerationFailed,
    Intended,
    LookFailed,
    NotFound,
    OutcomeUnknown,
    OutputFailed,
    Progressed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import RefusalKind
from app.domain.lifecycle import (
    AttemptState,
    IllegalEvent,
    JobState,
    Stage,
    Status,
    decide,
)
from app.domain.policy import Policy, RetryPolicy
from tests.domain.cases import (
    BORN,
    DEADLINE,
    EVENTS,
    EXPIRES,
    FAILURE,
    LATE,
    LEGAL,
    NOW,
    POLICY,
    STATES,
    after,
)


def _place(state: JobState) -> str:
    return state.stage.value if state.stage else state.status.value


def _attempt(state: JobState) -> AttemptState | None:
    return state.attempt.state if state.attempt else None


# ------------------------------------------------------------ every state × every event


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_every_event_in_every_state_is_decided_or_refused(
    state: str, event: str
) -> None:
    before = STATES[state]
    if before.is_terminal:
        assert decide(before, EVENTS[event], NOW, POLICY, 0.5) is before
    elif expected := LEGAL[state].get(event):
        assert _place(decide(before, EVENTS[event], NOW, POLICY, 0.5)) == expected
    else:
        with pytest.raises(IllegalEvent):
            decide(before, EVENTS[event], NOW, POLICY, 0.5)


@pytest.mark.parametrize("state", STATES)
def test_the_deadline_ends_every_live_job_but_one_that_is_made(state: str) -> None:
    before = STATES[state]
    if before.is_terminal:
        assert decide(before, EVENTS["expired"], LATE, POLICY, 0.5) is before
    elif expected := EXPIRES.get(state):
        expired = decide(before, EVENTS["expired"], LATE, POLICY, 0.5)
        assert _place(expired) == expected
        assert expired.open_attempt is None
        assert (expired.failure is None) == (expected == "cancelled")
    else:
        with pytest.raises(IllegalEvent):
            decide(before, EVENTS["expired"], LATE, POLICY, 0.5)


def test_the_deadline_is_not_a_moment_early() -> None:
    with pytest.raises(IllegalEvent):
        almost = LATE - timedelta(microseconds=1)
        decide(STATES["generating"], EVENTS["expired"], almost, POLICY, 0.5)


@pytest.mark.parametrize(
    ("state", "end"),
    [
        ("queued", None),
        ("queued_throttled", AttemptState.REFUSED),
        ("submitting", AttemptState.LOST),
        ("reconciling", AttemptState.LOST),
        ("generating", AttemptState.CANCELLED),
    ],
)
def test_the_deadline_closes_the_attempt_as_what_it_was(
    state: str, end: AttemptState | None
) -> None:
    assert _attempt(decide(STATES[state], EVENTS["expired"], LATE, POLICY, 0)) is end


# ------------------------------------------------------------------------------ attempts


@pytest.mark.parametrize("event", ["throttled", "account_refused"])
def test_a_refusal_that_is_not_the_jobs_fault_keeps_the_attempt(event: str) -> None:
    state = after("intended", event)

    assert (_attempt(state), state.attempts) == (AttemptState.READY, 1)
    again = decide(state, Intended(), NOW, POLICY, 0.5)
    assert again.attempt is not None
    assert (again.attempt.number, again.attempt.state) == (1, AttemptState.SENT)
    assert again.attempts == 1


def test_however_often_it_is_throttled_a_job_keeps_its_attempts() -> None:
    state = after()
    for _ in range(50):
        state = decide(state, Intended(), NOW, POLICY, 0.5)
        state = decide(state, EVENTS["throttled"], NOW, POLICY, 0.5)

    assert (state.status, state.attempts) == (Status.PENDING, 1)


@pytest.mark.parametrize("max_retries", [0, 1, 3])
@pytest.mark.parametrize(
    "ending",
    [
        ("refused_transient",),
        ("started", "failed_for_now"),
        ("started", "aborted"),
        ("unknown", "lost"),
    ],
    ids=" then ".join,
)
def test_a_job_gets_one_attempt_and_its_retries_and_then_fails(
    ending: tuple[str, ...], max_retries: int
) -> None:
    policy = Policy(retry=RetryPolicy(max_retries=max_retries))
    events = {**EVENTS, "lost": NotFound()}
    state, moment, made = after(), NOW, 0

    while not state.is_terminal:
        for name in ("intended", *ending):
            if name == "lost":
                moment += policy.grace
            state = decide(state, events[name], moment, policy, 0.5)
        made += 1

    assert made == state.attempts == max_retries + 1
    assert state.status is Status.FAILED
    assert state.failure is not None


def test_the_next_attempt_is_a_new_one() -> None:
    state = after("intended", "started", "failed_for_now", "intended")

    assert state.attempt is not None
    assert (state.attempt.number, state.attempt.handle) == (2, None)
    assert (state.attempts, state.progress) == (2, None)


@pytest.mark.parametrize(
    ("events", "end"),
    [
        (("refused_permanent",), AttemptState.REFUSED),
        (("refused_transient",), AttemptState.REFUSED),
        (("started", "generated"), AttemptState.SUCCEEDED),
        (("started", "failed_for_good"), AttemptState.FAILED),
        (("started", "failed_for_now"), AttemptState.FAILED),
        (("started", "aborted"), AttemptState.CANCELLED),
        (("started", "ended_by_provider"), AttemptState.CANCELLED),
    ],
    ids=str,
)
def test_an_attempt_ends_as_what_happened_to_it(
    events: tuple[str, ...], end: AttemptState
) -> None:
    assert _attempt(after("intended", *events)) is end


# ------------------------------------------------------------------------- reconciliation


def test_the_provider_is_asked_on_schedule_and_then_the_attempt_is_lost() -> None:
    state = decide(after(), Intended(), NOW, POLICY, 0.5)
    assert state.due_at == NOW + timedelta(seconds=2)
    asked = [2, 10, 30, 60, 120]
    state = decide(state, OutcomeUnknown("x"), NOW, POLICY, 0.5)

    for age in asked:
        assert state.due_at == NOW + timedelta(seconds=age)
        assert (state.stage, _attempt(state)) == (Stage.RECONCILING, AttemptState.SENT)
        state = decide(state, NotFound(), state.due_at, POLICY, 0.5)

    assert (state.stage, _attempt(state)) == (Stage.QUEUED, AttemptState.LOST)


def test_an_attempt_is_not_lost_a_moment_before_the_grace_period_is_over() -> None:
    almost = NOW + POLICY.grace - timedelta(microseconds=1)

    state = decide(STATES["reconciling"], NotFound(), almost, POLICY, 0.5)

    assert (state.stage, state.due_at) == (Stage.RECONCILING, NOW + POLICY.grace)


def test_an_outcome_unknown_since_long_ago_is_asked_for_at_once() -> None:
    later = NOW + POLICY.grace * 2

    state = decide(STATES["submitting"], OutcomeUnknown("died"), later, POLICY, 0.5)

    assert (state.stage, state.due_at) == (Stage.RECONCILING, later)


def test_a_lost_attempt_is_replaced_while_the_provider_would_still_show_it() -> None:
    last = NOW + POLICY.data_lifetime

    assert _place(decide(STATES["reconciling"], NotFound(), last, POLICY, 0)) == (
        "queued"
    )


def test_after_the_providers_hour_a_lost_attempt_is_never_replaced() -> None:
    too_late = NOW + POLICY.data_lifetime + timedelta(microseconds=1)

    state = decide(STATES["reconciling"], NotFound(), too_late, POLICY, 0.5)

    assert (state.status, _attempt(state)) == (Status.FAILED, AttemptState.LOST)
    assert state.failure is not None
    assert state.failure.code == "outcome_lost"


# -------------------------------------------------------------------------------- storing


def test_files_are_fetched_again_until_the_provider_drops_them() -> None:
    storing = STATES["storing"]
    again = OutputFailed(FAILURE, is_final=False)
    last = NOW + POLICY.data_lifetime

    assert _place(decide(storing, again, last, POLICY, 0.5)) == "storing"
    too_late = last + timedelta(microseconds=1)
    for event in (again, LookFailed("timeout")):
        state = decide(storing, event, too_late, POLICY, 0.5)
        assert state.status is Status.FAILED
        assert state.failure is not None
        assert state.failure.code == "output_expired"


def test_a_stored_job_keeps_all_its_warnings() -> None:
    storing = replace(STATES["storing"], warnings=("from birth",))

    state = decide(storing, Stored(1, ("late",)), NOW, POLICY, 0.5)

    assert state.warnings == ("from birth", "late")
    assert (state.status, state.progress) == (Status.COMPLETED, 1.0)


# --------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize(
    ("state", "due_at"),
    [
        ("submitting", NOW),
        ("generating", NOW),
        ("reconciling", STATES["reconciling"].due_at),
    ],
)
def test_a_cancel_makes_a_job_nobody_looks_at_due(state: str, due_at: object) -> None:
    cancelled = decide(STATES[state], CancelRequested(), NOW, POLICY, 0.5)

    assert cancelled.is_cancel_requested
    assert cancelled.due_at == due_at


@pytest.mark.parametrize("state", ["submitting", "reconciling", "generating"])
def test_a_cancel_leaves_the_lease_of_a_look_in_progress(state: str) -> None:
    lease_end = NOW + timedelta(seconds=30)
    claimed = replace(STATES[state], is_claimed=True, due_at=lease_end)

    cancelled = decide(claimed, CancelRequested(), NOW, POLICY, 0.5)

    assert (cancelled.is_cancel_requested, cancelled.due_at) == (True, lease_end)
    assert cancelled.is_claimed


def test_a_second_cancel_is_no_news() -> None:
    state = STATES["generating_cancelled"]

    assert decide(state, CancelRequested(), NOW, POLICY, 0.5).version == state.version


def test_a_job_cancelled_while_its_request_was_out_is_looked_at_at_once() -> None:
    state = decide(STATES["submitting_cancelled"], Started("h"), NOW, POLICY, 0.5)

    assert (state.stage, state.due_at) == (Stage.GENERATING, NOW)


def test_a_prediction_that_ends_at_the_deadline_is_late_not_cancelled() -> None:
    state = decide(STATES["generating"], GenerationCancelled(), LATE, POLICY, 0.5)

    assert state.failure is not None
    assert (state.status, state.failure.code) == (Status.FAILED, "deadline_exceeded")


# ------------------------------------------------------------------------ waiting, version


def test_progress_never_goes_back_and_stays_a_share() -> None:
    state = STATES["generating"]
    seen = []
    for share in (0.25, 0.1, None, -3.0, 0.5, 7.0, math.nan):
        state = decide(state, Progressed(share), NOW, POLICY, 0.5)
        seen.append(state.progress)

    assert seen == [0.25, 0.25, 0.25, 0.25, 0.5, 1.0, 1.0]


def test_progress_is_counted_in_whole_percents() -> None:
    state = decide(STATES["generating"], Progressed(0.33333), NOW, POLICY, 0.5)
    again = decide(state, Progressed(0.33334), NOW, POLICY, 0.5)

    assert state.progress == 0.33
    assert again.version == state.version


@pytest.mark.parametrize(
    ("age", "wait"), [(0, 0.5), (4, 0.5), (20, 2.0), (50, 5.0), (600, 5.0)]
)
def test_looks_get_rarer_with_age(age: float, wait: float) -> None:
    now = NOW + timedelta(seconds=age)

    state = decide(STATES["generating"], Progressed(), now, POLICY, 0.5)

    assert state.due_at == now + timedelta(seconds=wait)


def test_looks_that_fail_in_a_row_are_repeated_ever_later_up_to_a_minute() -> None:
    state, waits = STATES["generating"], []
    for _ in range(40):
        state = decide(state, LookFailed("timeout"), NOW, POLICY, 1.0)
        assert state.due_at is not None
        waits.append((state.due_at - NOW).total_seconds())

    assert waits[:6] == [2, 4, 8, 16, 32, 60]
    assert set(waits[6:]) == {60}
    assert state.version == STATES["generating"].version


def test_a_look_that_works_forgives_the_ones_that_failed() -> None:
    state = decide(STATES["generating"], LookFailed("timeout"), NOW, POLICY, 1.0)

    assert decide(state, Progressed(), NOW, POLICY, 1.0).look_failures == 0


def test_a_failed_look_is_never_repeated_at_once() -> None:
    state = decide(STATES["generating"], LookFailed("timeout"), NOW, POLICY, 0.0)

    assert state.due_at == NOW + POLICY.shortest_look


# ------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("draw", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("base", [1.0, 2.0, 10.0])
def test_retries_wait_a_random_part_of_an_exponential_up_to_the_cap(
    base: float, draw: float
) -> None:
    policy = RetryPolicy(base=base, cap=timedelta(seconds=300))

    for retry in (1, 2, 5, 33, 10_000):
        ceiling = min(300.0, base ** min(retry, 33))
        waited = policy.delay(retry, draw).total_seconds()
        assert waited == pytest.approx(draw * ceiling, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "waited"),
    [(None, 1.0), (0.0, 1.0), (-5.0, 1.0), (0.5, 1.0), (7.0, 7.0), (1e9, 300.0)],
)
def test_a_retry_after_is_honoured_and_clamped(
    asked: float | None, waited: float
) -> None:
    delay = RetryPolicy(base=2.0).delay(1, 0.5, at_least=asked)

    assert delay.total_seconds() == waited


@pytest.mark.parametrize(
    ("kind", "asked", "least"),
    [
        (RefusalKind.TRANSIENT, 20.0, 20.0),
        (RefusalKind.THROTTLED, 20.0, 20.0),
        (RefusalKind.THROTTLED, 1e6, 300.0),
        (RefusalKind.ACCOUNT, None, 30.0),
        (RefusalKind.ACCOUNT, 45.0, 45.0),
    ],
)
def test_a_refused_job_waits_as_it_was_told(
    kind: RefusalKind, asked: float | None, least: float
) -> None:
    refused = Refused(kind, FAILURE, asked)

    state = decide(STATES["submitting"], refused, NOW, POLICY, 0.0)

    assert state.due_at == NOW + timedelta(seconds=least)


def test_a_newborn_job_is_due_at_once() -> None:
    state = after()

    assert (state.status, state.due_at, state.version) == (Status.PENDING, BORN, 1)
    assert state.deadline_at == BORN + DEADLINE


def test_starting_time_is_that_of_the_first_attempt() -> None:
    state = after("intended", "refused_transient")
    again = decide(state, Intended(), NOW + timedelta(minutes=1), POLICY, 0.5)

    assert again.started_at == NOW


def test_an_illegal_event_names_itself_and_the_state() -> None:
    with pytest.raises(IllegalEvent, match="GenerationFailed in pending/queued"):
        decide(after(), GenerationFailed(FAILURE, True), NOW, POLICY, 0.5)
