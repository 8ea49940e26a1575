"""The laws of the lifecycle, attacked with any event at any moment."""

from dataclasses import replace
from datetime import datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from app.domain import journal
from app.domain.events import Event
from app.domain.lifecycle import IllegalEvent, decide
from app.domain.policy import Policy, RetryPolicy
from app.domain.state import Attempt, AttemptState, JobState, Stage, Status, new_job
from tests.domain.cases import BORN, EVENTS, LEGAL
from tests.support.jobs import timeless

A_LITTLE = st.floats(0, 5)
A_WHILE = st.sampled_from([0, 1, 2, 10, 31, 121, 901, 3301])
CLOSED = {
    *(AttemptState.REFUSED, AttemptState.FAILED),
    *(AttemptState.LOST, AttemptState.CANCELLED),
}


def _visible(state: JobState) -> JobState:
    return replace(timeless(state), version=0)


class Lifecycle(RuleBasedStateMachine):
    """One job, its history, and everything every attempt of it has been."""

    @initialize(max_retries=st.integers(0, 3), deadline=st.sampled_from([20, 900]))
    def give_birth(self, max_retries: int, deadline: int) -> None:
        self.policy = Policy(retry=RetryPolicy(max_retries=max_retries))
        self.deadline = timedelta(seconds=deadline)
        self.now = BORN
        self.state = new_job(self.now, self.deadline)
        self.history: list[tuple[Event, datetime]] = []
        self.attempts: list[list[Attempt]] = []
        self.was_cancel_requested = False

    def happen(self, event: Event, draw: float) -> None:
        """Let the event happen; what `decide` refuses must change nothing."""
        before = self.state
        try:
            after = decide(before, event, self.now, self.policy, draw)
        except IllegalEvent:
            return
        self.was_cancel_requested |= after.is_cancel_requested
        self._check_change(before, after)
        if after.version != before.version:
            self.history.append((event, self.now))
        if after.attempt is not None and after.attempt != before.attempt:
            self._check_attempt(after.attempt)
        self.state = after

    def _check_change(self, before: JobState, after: JobState) -> None:
        if before.is_terminal:
            assert after == before, "a finished job changed"
        is_visible = _visible(before) != _visible(after)
        assert after.version == before.version + is_visible
        if after.due_at is not None:
            assert after.due_at >= min(self.now, before.due_at or self.now)
        if before.is_claimed and not after.is_terminal:
            assert after.is_claimed, "a claim was taken away"
        assert after.attempts in (before.attempts, before.attempts + 1)
        assert after.created_at == before.created_at
        assert after.deadline_at == before.deadline_at

    def _check_attempt(self, attempt: Attempt) -> None:
        if attempt.number > len(self.attempts):
            assert attempt.number == len(self.attempts) + 1
            assert attempt.state is AttemptState.SENT, "sent before it was intended"
            if self.attempts:
                assert self.attempts[-1][-1].state in CLOSED
            self.attempts.append([attempt])
            return
        assert attempt.number == len(self.attempts), "an old attempt changed"
        last = self.attempts[-1][-1]
        if last.state is AttemptState.LOST:
            assert attempt.state is AttemptState.RUNNING, "lost, and not found either"
        else:
            assert last.state.is_open, "a closed attempt changed"
        assert last.handle in (None, attempt.handle), "a handle changed"
        if attempt.state is AttemptState.SENT:
            assert last.state is AttemptState.READY, "sent twice"
        if attempt.state is AttemptState.READY:
            assert last.handle is None, "a bought attempt is to be sent again"
        self.attempts[-1].append(attempt)

    @rule(event=st.sampled_from(sorted(EVENTS)), draw=st.floats(0, 1))
    def anything_happens(self, event: str, draw: float) -> None:
        self.happen(EVENTS[event], draw)

    @precondition(lambda self: not self.state.is_terminal)
    @rule(data=st.data(), draw=st.floats(0, 1))
    def something_likely_happens(self, data: st.DataObject, draw: float) -> None:
        assert self.state.stage is not None
        likely = sorted(LEGAL[self.state.stage.value].keys() - {"cancel"})
        self.happen(EVENTS[data.draw(st.sampled_from(likely))], draw)

    @rule(seconds=st.one_of(A_LITTLE, A_WHILE))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.state.due_at is not None)
    @rule()
    def the_next_look_comes(self) -> None:
        assert self.state.due_at is not None
        self.now = max(self.now, self.state.due_at)

    @precondition(lambda self: self.state.stage not in (None, Stage.QUEUED))
    @rule(is_claimed=st.booleans())
    def somebody_looks_or_dies(self, is_claimed: bool) -> None:
        lease_end = self.now + timedelta(seconds=30)
        due_at = lease_end if is_claimed else self.now
        self.state = replace(self.state, is_claimed=is_claimed, due_at=due_at)

    @invariant()
    def finished_means_never_due_and_a_moment_and_no_stage(self) -> None:
        state, is_over = self.state, self.state.status.is_terminal
        assert (state.due_at is None) == is_over
        assert (state.completed_at is not None) == is_over
        assert (state.stage is None) == is_over
        assert (state.status is Status.PENDING) == (state.stage is Stage.QUEUED)
        assert not (is_over and state.is_claimed)

    @invariant()
    def failed_means_a_reason(self) -> None:
        assert (self.state.status is Status.FAILED) == (self.state.failure is not None)

    @invariant()
    def purchases_are_bounded(self) -> None:
        assert len(self.attempts) == self.state.attempts
        assert self.state.attempts <= self.policy.retry.max_retries + 1

    @invariant()
    def at_most_the_latest_attempt_is_open(self) -> None:
        latest = [history[-1] for history in self.attempts]
        assert not any(attempt.state.is_open for attempt in latest[:-1])
        assert self.state.attempt == (latest[-1] if latest else None)
        if self.state.is_terminal:
            assert self.state.open_attempt is None

    @invariant()
    def the_stage_agrees_with_the_attempt(self) -> None:
        expected = {
            Stage.SUBMITTING: AttemptState.SENT,
            Stage.RECONCILING: AttemptState.SENT,
            Stage.GENERATING: AttemptState.RUNNING,
            Stage.STORING: AttemptState.SUCCEEDED,
        }
        stage, attempt = self.state.stage, self.state.attempt
        if stage in expected:
            assert attempt is not None
            assert attempt.state is expected[stage]
            assert (attempt.handle is None) == (attempt.state is AttemptState.SENT)

    @invariant()
    def cancelled_only_if_asked_for(self) -> None:
        if self.state.status is Status.CANCELLED:
            assert self.was_cancel_requested
        if self.was_cancel_requested:
            assert self.state.status is not Status.PENDING

    @invariant()
    def progress_is_a_share(self) -> None:
        assert self.state.progress is None or 0 <= self.state.progress <= 1

    @invariant()
    def the_history_gives_back_the_state(self) -> None:
        replayed = journal.replay(BORN, self.deadline, self.history, self.policy)
        assert timeless(replayed) == timeless(self.state)
        assert self.state.version == 1 + len(self.history)


Lifecycle.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_the_laws_of_the_lifecycle = Lifecycle.TestCase
