import math
from dataclasses import replace
from datetime import timedelta

import pytest

from app.domain.events import (
    CancelRequested,
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
from app.domain.generation import RefusalKind
from app.domain.lifecycle import IllegalEvent, decide
from app.domain.policy import Policy, RetryPolicy
from app.domain.state import AttemptState, JobState, Stage, Status
from tests.domain.cases import (
    BORN,
    DEADLINE,
    EVENTS,
    EXPIRES,
    FAILURE,
    LATE,
    LEGAL,
    NOW,
    OVERTAKEN,
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
        ("queued_lost", AttemptState.LOST),
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


@pytest.mark.parametrize("event", ["unreachable", "throttled", "account_refused"])
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
    patient = replace(STATES["reconciling"], deadline_at=last + DEADLINE)

    assert _place(decide(patient, NotFound(), last, POLICY, 0)) == "queued"


def test_after_the_providers_hour_a_lost_attempt_is_never_replaced() -> None:
    too_late = NOW + POLICY.data_lifetime + timedelta(microseconds=1)

    patient = replace(STATES["reconciling"], deadline_at=too_late + DEADLINE)
    state = decide(patient, NotFound(), too_late, POLICY, 0.5)

    assert (state.status, _attempt(state)) == (Status.FAILED, AttemptState.LOST)
    assert state.failure is not None
    assert state.failure.code == "outcome_lost"


def test_what_the_list_does_not_show_at_the_deadline_is_late() -> None:
    state = decide(STATES["reconciling"], NotFound(), LATE, POLICY, 0.5)

    assert (state.status, _attempt(state)) == (Status.FAILED, AttemptState.LOST)
    assert state.failure is not None
    assert state.failure.code == "deadline_exceeded"


# ----------------------------------------------------------------------------- what is heard


@pytest.mark.parametrize("state", ["submitting", "reconciling"])
def test_a_purchase_that_is_heard_of_is_adopted(state: str) -> None:
    heard = decide(STATES[state], Heard(1, "h-9", is_over=False), NOW, POLICY, 0.5)

    assert heard.attempt is not None
    assert (heard.attempt.state, heard.attempt.handle) == (AttemptState.RUNNING, "h-9")
    assert (heard.has_news, heard.version) == (False, STATES[state].version + 1)


@pytest.mark.parametrize("state", ["submitting", "reconciling", "queued_lost"])
def test_a_purchase_that_is_heard_to_be_over_is_looked_at_now(state: str) -> None:
    heard = decide(STATES[state], Heard(1, "h-9", is_over=True), NOW, POLICY, 0.5)

    assert (heard.stage, heard.due_at) == (Stage.GENERATING, NOW)
    assert heard.has_news


def test_a_lost_purchase_that_turns_up_is_used_instead_of_another() -> None:
    lost = STATES["queued_lost"]

    used = decide(lost, Heard(1, "h-9", is_over=False), NOW, POLICY, 0.5)

    assert used.attempt is not None
    assert (used.attempt.number, used.attempt.handle) == (1, "h-9")
    assert (used.status, used.attempts) == (Status.PROCESSING, 1)


def test_an_older_purchase_stands_in_for_one_that_was_not_made_yet() -> None:
    lost = decide(STATES["queued_lost"], Intended(), NOW, POLICY, 0.5)
    ready = decide(lost, EVENTS["throttled"], NOW, POLICY, 0.5)

    used = decide(ready, Heard(1, "h-9", is_over=False), NOW, POLICY, 0.5)

    assert used.attempt is not None
    assert (used.attempt.number, used.attempt.handle) == (2, "h-9")


@pytest.mark.parametrize("number", [1, 3])
def test_what_is_heard_of_another_attempt_changes_nothing(number: int) -> None:
    second = decide(STATES["queued_again"], Intended(), NOW, POLICY, 0.5)

    assert decide(second, Heard(number, "h-9", True), NOW, POLICY, 0.5) is second


def test_a_running_attempt_has_one_prediction() -> None:
    with pytest.raises(IllegalEvent):
        decide(STATES["generating"], Started("another"), NOW, POLICY, 0.5)
    same = decide(STATES["generating"], Heard(1, "another", True), NOW, POLICY, 0.5)
    assert same is STATES["generating"]


@pytest.mark.parametrize("event", OVERTAKEN)
def test_a_look_that_was_overtaken_changes_nothing_but_the_next_look(
    event: str,
) -> None:
    heard = decide(STATES["submitting"], EVENTS["heard"], NOW, POLICY, 0.5)
    later = NOW + timedelta(seconds=1)

    state = decide(heard, EVENTS[event], later, POLICY, 0.5)

    assert state == replace(heard, due_at=later)


def test_an_answer_that_was_contradicted_is_asked_for_again_ever_later() -> None:
    state, waits = STATES["generating"], []
    for _ in range(12):
        state = decide(state, EVENTS["contradicted"], NOW, POLICY, 0.5)
        assert state.due_at is not None
        waits.append((state.due_at - NOW).total_seconds())

    assert waits[:6] == [0.25, 0.5, 1, 2, 4, 5]
    # In the end the provider's own answer is believed, and it is a straggler's turn.
    assert waits[10] > 5
    assert (
        state.version
        == decide(STATES["generating"], Progressed(0.5), NOW, POLICY, 0.5).version
    )


def test_a_picture_was_made_when_it_was_learned_not_when_it_was_written_down() -> None:
    now = NOW + timedelta(seconds=5)

    state = decide(STATES["generating"], Generated(1.0, 2.0), now, POLICY, 0.5)
    early = decide(STATES["generating"], Generated(1.0, 1e6), now, POLICY, 0.5)

    assert state.generated_at == NOW + timedelta(seconds=3)
    assert early.generated_at == early.started_at


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
    ("usual", "age", "wait"),
    [
        *((None, 0, 9.0), (None, 4, 5.0), (None, 8.9, 0.5), (None, 9, 5.0)),
        *((None, 30, 10.0), (None, 600, 60.0)),
        *((0.5, 0, 5.0), (0.5, 5, 5.0), (20.0, 0, 60.0), (20.0, 59, 1.0)),
        *((20.0, 75, 25.0), (1e12, 0, 899.0), (-1.0, 0, 5.0)),
        # Neither is the picture of a slow model kept waiting for long.
        *((300.0, 0, 360.0), (300.0, 300, 60.0)),
        # The deadline is not slept through.
        *((None, 880, 19.0), (None, 898.9, 0.5), (None, 2000, 0.5)),
    ],
)
def test_a_look_by_itself_comes_for_stragglers_and_gets_rarer_with_age(
    usual: float | None, age: float, wait: float
) -> None:
    now = NOW + timedelta(seconds=age)

    state = decide(STATES["generating"], Progressed(None, usual), now, POLICY, 0.5)

    assert state.due_at is not None
    assert (state.due_at - now).total_seconds() == pytest.approx(wait)


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


def test_looks_that_end_in_silence_are_spaced_out_and_in_the_end_the_job_fails() -> (
    None
):
    state, waits = STATES["generating"], []
    for times in range(1, POLICY.most_silent_looks):
        after = decide(state, WentSilent(times), NOW, POLICY, 1.0)
        assert after.due_at is not None and after.silent_looks == times
        moved = after.due_at != state.due_at
        waits.append((after.due_at - NOW).total_seconds() if moved else None)
        assert after.version == state.version

    assert waits == [None, None, 2, 4, 8, 16, 32, 60, 60]
    end = decide(state, WentSilent(POLICY.most_silent_looks), NOW, POLICY, 1.0)
    assert end.failure is not None
    assert (end.status, end.failure.code) == (Status.FAILED, "poisonous")
    assert _attempt(end) is AttemptState.CANCELLED


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
